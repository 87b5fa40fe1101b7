"""Which calls keep their nodes for a plugin library: the library is asked about each, within its shapes."""

from pathlib import Path

import onnx
import pytest

from rotexport.targets import acceptance
from rotexport.targets.acceptance import Refusal, split_calls

MODEL = """<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>
g (float16[batch, rows, 8] x) => (float16[batch, rows, 8] y) <int8[2, 2] table = {1, 2, 3, 4}> {
  [one] a = rotexport.Mix<width = 8, scale = 0.5, plugin_namespace = "rotexport">(x, table)
  [two] b = rotexport.Mix<width = 8, scale = 0.5, plugin_namespace = "rotexport">(a, table)
  [other] c = rotexport.Other(b)
  y = Identity(c)
}
<domain: "rotexport", opset_import: ["": 23]> Mix <width, scale> (x, table) => (y) { y = Identity(x) }
<domain: "rotexport", opset_import: ["": 23]> Other (x) => (y) { y = Identity(x) }"""
PROFILES = [{"batch": (1, 1, 2), "sequence": (1, 5, 9)}, {"batch": (1, 1, 2), "sequence": (1, 1, 1)}]
X = ("x", onnx.TensorProto.FLOAT16, ["batch", "4 + sequence", 8])


def model(**shapes: list[int | str]) -> onnx.ModelProto:
    """Return a model with two calls that a plugin may take, and the shapes that it states of their inputs."""
    made = onnx.parser.parse_model(MODEL)
    made.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info(*X))
    for name, shape in shapes.items():
        made.graph.value_info.append(onnx.helper.make_tensor_value_info(name, X[1], shape))
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """Stand in for the library: refuse tensors of more than 12 rows; return what was asked."""
    questions = []

    def judge(library: Path, put: list) -> list[str | None]:
        questions.extend(put)
        return ["too long" if q.inputs[0].largest[1] > 12 else None for q in put]

    monkeypatch.setattr(acceptance, "judge", judge)
    return questions


def test_a_node_is_asked_about_in_every_profile(asked: list) -> None:
    """Its attributes without those for TensorRT; symbolic sizes, sums too, from the profiles."""
    split_calls(model(a=["batch", 3, 8]), {"Mix"}, Path("library.so"), PROFILES)
    assert len(asked) == 4
    assert asked[0].operator == "Mix" and asked[0].numbers == {"width": 8, "scale": 0.5}
    assert [(q.inputs[0].smallest, q.inputs[0].largest) for q in asked] == [
        ((1, 5, 8), (2, 13, 8)),
        ((1, 5, 8), (2, 5, 8)),
        ((1, 3, 8), (2, 3, 8)),
        ((1, 3, 8), (2, 3, 8)),
    ]
    assert asked[0].inputs[1].dtype == onnx.TensorProto.INT8 and asked[0].inputs[1].largest == (2, 2)


def test_what_one_profile_makes_too_long_is_refused_and_the_rest_kept(asked: list) -> None:
    kept, refused = split_calls(model(a=["batch", 3, 8]), {"Mix"}, Path("library.so"), PROFILES)
    assert kept == ["two"]
    assert refused == [Refusal("one", "Mix", "too long")]


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({}, "the graph states no shape for 'a'"),
        ({"a": ["batch", "rows", 8]}, "'a' has a dimension called 'rows', which no profile bounds"),
    ],
)
def test_a_node_of_unknown_shape_is_expanded_and_the_reason_given(
    asked: list, shapes: dict, reason: str
) -> None:
    _, refused = split_calls(model(**shapes), {"Mix"}, Path("library.so"), PROFILES[1:])
    assert refused == [Refusal("two", "Mix", reason)]


def test_operators_that_the_library_lacks_are_not_asked_about(asked: list) -> None:
    assert split_calls(model(), {"Elsewhere"}, Path("library.so"), PROFILES) == ([], [])
    assert not asked
