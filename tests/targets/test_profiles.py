"""Optimization profiles: shapes from the names of dimensions."""

import onnx
import pytest

from rotexport.errors import TargetError
from rotexport.targets.profiles import Profiles, input_shapes

MODEL = """<ir_version: 11, opset_import: ["": 23]>
g (int64[batch, sequence] ids, int64[batch, total] mask, int8[batch, 3, past, 64] codes, float[3] fixed)
  => (int64[batch, sequence] y) { y = Identity(ids) }"""


def test_every_dynamic_input_gets_shapes():
    model = onnx.parser.parse_model(MODEL)
    shapes = input_shapes(model, Profiles(max_batch=2, max_length=64).whole())
    assert shapes == {
        "ids": ([1, 1], [1, 1], [2, 64]),
        "mask": ([1, 1], [1, 33], [2, 64]),
        "codes": ([1, 3, 0, 64], [1, 3, 32, 64], [2, 3, 63, 64]),
    }


def test_a_bounded_cache_takes_calls_up_to_its_window():
    ranges = Profiles(max_batch=2, max_length=2048).streaming(1020).whole()
    assert ranges == {"batch": (1, 1, 2), "sequence": (1, 1, 1020), "logit_count": (1, 1, 16)}
    assert Profiles(max_length=64).streaming(1020).whole()["sequence"] == (1, 1, 64)


def test_a_prompt_that_chooses_what_stays_may_be_longer_than_the_window():
    ranges = Profiles(max_length=2048).streaming(1020, whole_prompts=True).whole()
    assert ranges["sequence"] == (1, 1, 2048)
    assert ranges["logit_count"] == (1, 1, 16)


def test_prompts_and_steps_apart():
    prompts, steps = Profiles(max_batch=1, max_length=64).split()
    assert prompts["sequence"][2] == 64
    assert prompts["past"][1] == 0
    assert steps["sequence"] == (1, 1, 1)


@pytest.mark.parametrize(("batch", "length"), [(0, 64), (1, 1)])
def test_senseless_limits_are_refused(batch, length):
    with pytest.raises(TargetError, match="is not at least"):
        Profiles(batch, length)


def test_a_dimension_of_another_name_is_refused():
    model = onnx.parser.parse_model(MODEL.replace("past", "history"))
    with pytest.raises(
        TargetError, match="'codes' has a dimension called 'history'; call it batch or sequence"
    ):
        input_shapes(model, Profiles().whole())
