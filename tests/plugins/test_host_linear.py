"""The QuantizedLinear plugins, driven through their IPluginV3 interfaces on the emulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from driver import Host, HostError, Request
from support.quantized_linear import BFLOAT16, FLOAT, HALF, Case, attributes, variants

TYPES = {FLOAT: 0, HALF: 1, BFLOAT16: 7}
INT8 = 2
BASES = [Case(form, rows=6, inputs=160, outputs=11, group=64, out=HALF) for form in ("W8A8", "W4A8", "W4A4")]
OPERATORS = [case for base in BASES for case in variants(base)]
BY_ROW = ("x", "x_scale", "x_zero", "residual", "gate")


def fields(case: Case) -> list[tuple[str, np.ndarray]]:
    return [(name, np.int32([value])) for name, value in attributes(case).items()]


def request(case: Case, **changed: np.ndarray) -> Request:
    """Return a request for rows [2, rows / 2], some inputs changed."""
    inputs = {
        name: array.reshape(2, -1, array.shape[-1]) if name in BY_ROW else array
        for name, array in case.operands(seed=7).inputs().items()
    }
    return Request(case.operator, list((inputs | changed).values()), fields(case))


def test_every_operator_has_a_creator(host: Host) -> None:
    listed = [creator for creator in host.creators() if creator[0].startswith("QuantizedLinear")]
    common = ["1", "rotexport", "PLUGIN CREATOR_V3ONE", "group:5:1", "out_type:5:1"]
    assert sorted(listed) == sorted([case.operator, *common] for case in OPERATORS)


@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.operator)
def test_a_plugin_lives_and_multiplies(host: Host, case: Case) -> None:
    (y,) = host.live(request(case))
    assert y.shape == (2, case.rows // 2, case.outputs) and y.dtype == case.out
    operands = case.operands(seed=7)
    error = np.abs(y.reshape(case.rows, -1).astype(np.float64) - operands.reference())
    assert np.all(error <= operands.bound())


@pytest.mark.parametrize("out", [FLOAT, BFLOAT16], ids=str)
def test_results_have_the_type_asked_for(host: Host, out: np.dtype) -> None:
    case = replace(BASES[1], ending="Residual", out=out)
    (y,) = host.live(request(case))
    assert y.dtype == out
    operands = case.operands(seed=7)
    error = np.abs(y.reshape(case.rows, -1).astype(np.float64) - operands.reference())
    assert np.all(error <= operands.bound())


def test_rows_split_over_k_use_the_workspace(host: Host) -> None:
    case = Case("W8A8", rows=2, inputs=2560, outputs=5, group=2560)
    (y,) = host.live(request(case))
    operands = case.operands(seed=7)
    assert np.all(np.abs(y.reshape(2, -1) - operands.reference()) <= operands.bound())


def test_exactly_the_supported_types_and_formats(host: Host) -> None:
    for out, code in TYPES.items():
        case = replace(BASES[1], two_level=True, ending="Gated", out=out)
        accepted, other = host.combinations(request(case))
        assert accepted == {(INT8, 0, INT8, INT8, 0, 0, code, code)}
        assert other == 0


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([("group", np.int32([64]))], "field 'out_type' is missing"),
        (
            [("group", np.int32([48])), ("out_type", np.int32([10]))],
            "field 'group' is 48, must be a multiple of 32",
        ),
        (
            [("group", np.int32([0])), ("out_type", np.int32([10]))],
            "field 'group' is 0, must be a multiple of 32",
        ),
        (
            [("group", np.int32([64])), ("out_type", np.int32([2]))],
            "field 'out_type' is 2, must be 1 (float32)",
        ),
        (
            [("group", np.float32([64])), ("out_type", np.int32([1]))],
            "field 'group' is of type float32, must be int32",
        ),
    ],
)
def test_creators_refuse_bad_fields(host: Host, given: list[tuple[str, np.ndarray]], complaint: str) -> None:
    asked = request(BASES[0])
    with pytest.raises(HostError) as caught:
        host.live(Request(asked.plugin, asked.inputs, given))
    assert str(caught.value).startswith("createPlugin: logged rotexport: QuantizedLinearW8A8: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "step", "complaint"),
    [
        ({"bias": np.zeros(10, np.float32)}, "getOutputShapes", "input 'bias' has shape [10], must be [11]"),
        ({"weight": np.zeros((11, 80), np.int8)}, "getOutputShapes", "rows of 160 are no multiple of the group of 64"),
        ({"weight": np.zeros((11, 64), np.int8)}, "getOutputShapes", "has shape [3, 11], must be [2, 11]"),
        (
            {"weight": np.zeros((11, 64), np.int8), "weight_scale": np.ones((2, 11), np.float32)},
            "getOutputShapes",
            "2 groups of 64 do not hold 160 elements",
        ),
        ({"weight": np.zeros(11, np.int8)}, "getOutputShapes", "input 'weight' has shape [11], must have two axes"),
        ({"weight_scale": np.ones((2, 11), np.float32)}, "getOutputShapes", "has shape [2, 11], must be [3, 11]"),
        ({"x_scale": np.ones((2, 3, 2), np.float32)}, "getOutputShapes", "2 scales for a row of x, must be 1 or 3"),
        ({"x": np.zeros((2, 3, 164), np.int8)}, "getOutputShapes", "rows of 164 elements: the kernel needs"),
        ({"x_scale": np.ones((2, 3, 1), np.float16)}, "getOutputDataTypes", "input 1 is of type 1, must be 0"),
        ({"residual": np.ones((2, 3, 11), np.float32)}, "getOutputDataTypes", "input 5 is of type 0, must be 1"),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused_before_anything_runs(
    host: Host, changed: dict[str, np.ndarray], step: str, complaint: str
) -> None:
    with pytest.raises(HostError) as caught:
        host.live(request(replace(BASES[1], ending="Residual"), **changed))
    message = str(caught.value)
    assert message.startswith(step) and complaint in message
