"""The QuantizedLinear kernels on the emulator against int64 sums and against the operators' ONNX bodies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from emulated import EmulatorError
from emulated_linear import EmulatedLinear, problem_of
from structures import LinearProblem
from support.quantized_linear import BFLOAT16, HALF, Case, Operands, feeds, model_of, variants

FORMS = ("W8A8", "W4A8", "W4A4")
FEW, MANY = 16, 17  # rows up to which, and from which on, a kernel is chosen
LONG = (2336, 1184)  # elements of a row that are split over several thread blocks, by kernel
MULTIPROCESSORS = 8  # of the device that plans are made for: K is split over several thread blocks


@pytest.fixture(scope="module")
def kernels(emulated: Path) -> EmulatedLinear:
    return EmulatedLinear(emulated)


def with_unit_scales(case: Case, extreme: bool = True) -> Operands:
    """Return operands whose y is the integer sum itself."""
    plain = case.operands(extreme=extreme)
    return replace(
        plain,
        x_scale=np.ones_like(plain.x_scale),
        weight_scale=np.ones_like(plain.weight_scale),
        bias=np.zeros_like(plain.bias),
    )


def integers(operands: Operands) -> np.ndarray:
    return operands.group_sums().sum(axis=0)


def assert_within(y: np.ndarray, operands: Operands) -> None:
    assert np.all(np.abs(y.astype(np.float64) - operands.reference()) <= operands.bound())


@pytest.mark.parametrize("two_level", [False, True], ids=["channel", "two_level"])
@pytest.mark.parametrize("rows", [1, 7, FEW, MANY, 130])
@pytest.mark.parametrize("form", FORMS)
def test_sums_of_a_column_are_exact(kernels: EmulatedLinear, form: str, rows: int, two_level: bool) -> None:
    """Per channel or two-level: one integer sum, rounded to float32 once, split over K or not."""
    if two_level and form == "W8A8":
        pytest.skip("factors widen 4-bit weights")
    inputs = LONG[rows > FEW]
    case = Case(form, rows, inputs, outputs=131, group=64 if two_level else inputs, two_level=two_level)
    operands = with_unit_scales(case)
    exact = integers(operands).astype(np.float32)
    np.testing.assert_array_equal(kernels.run(operands), exact)
    if rows in (7, 130):
        assert kernels.plan(problem_of(case), MULTIPROCESSORS)[0].geometry.splits > 1
        np.testing.assert_array_equal(kernels.run(operands, MULTIPROCESSORS), exact)


@pytest.mark.parametrize("rows", [5, 19])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("form", FORMS)
def test_sums_of_a_group_are_exact(kernels: EmulatedLinear, form: str, group: int, rows: int) -> None:
    """One group's scale is a power of two, the others vanish: what is left is that group's integer sum."""
    case = Case(form, rows, inputs=544, outputs=9, group=group)
    operands = with_unit_scales(case)
    sums = operands.group_sums()
    for chosen in (0, case.groups - 1):  # the last one is short unless the group is 32
        scale = np.zeros_like(operands.weight_scale)
        scale[chosen] = 0.25
        y = kernels.run(replace(operands, weight_scale=scale), MULTIPROCESSORS)
        np.testing.assert_array_equal(y, sums[chosen].astype(np.float32) / 4)


@pytest.mark.parametrize("rows", [3, 21])
@pytest.mark.parametrize("form", FORMS)
def test_every_variant_is_within_its_stated_error(kernels: EmulatedLinear, form: str, rows: int) -> None:
    """Short last group, an odd number of columns, all endings and types."""
    base = Case(form, rows, inputs=416, outputs=37, group=128)
    for number, case in enumerate([*variants(base), replace(base, row_groups=True)]):
        typed = replace(case, out=(np.dtype(np.float32), HALF, BFLOAT16)[number % 3])
        operands = typed.operands(seed=number, extreme=True)
        assert_within(kernels.run(operands, MULTIPROCESSORS if number % 2 else 1), operands)


@pytest.mark.parametrize("rows", [4, 18])
@pytest.mark.parametrize("out", [HALF, BFLOAT16, np.dtype(np.float32)], ids=str)
def test_pairs_of_columns_are_stored_in_every_type(kernels: EmulatedLinear, out: np.dtype, rows: int) -> None:
    for ending in ("", "Residual", "Gated"):
        operands = Case("W4A8", rows, inputs=128, outputs=36, group=64, ending=ending, out=out).operands()
        assert_within(kernels.run(operands), operands)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_body(kernels: EmulatedLinear, form: str, rows: int) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for case in variants(Case(form, rows, inputs=320, outputs=21, group=96)):
        operands = case.operands(seed=3)
        model = model_of(case, operands)
        session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        body = session.run(None, feeds(model, operands))[0]
        assert np.all(np.abs(kernels.run(operands) - body) <= 2 * operands.bound())


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("form", FORMS)
def test_order_of_threads_and_blocks_changes_nothing(kernels: EmulatedLinear, form: str, rows: int) -> None:
    inputs = LONG[rows > FEW]
    for case in (
        Case(form, rows, inputs, outputs=70, group=32, row_groups=True),
        Case(form, rows, inputs, outputs=70, group=inputs),
    ):
        operands = case.operands(seed=5)
        first = kernels.run(operands, MULTIPROCESSORS)
        for schedule in (1, 2):
            np.testing.assert_array_equal(kernels.run(operands, MULTIPROCESSORS, schedule), first)


def test_every_code_less_every_zero_point_times_the_largest_factor(kernels: EmulatedLinear) -> None:
    """Neighbours in a word do not borrow from each other, wherever between -127 and 127 the products lie."""
    case = Case("W4A8", rows=3, inputs=512, outputs=32, group=32, two_level=True)
    operands = with_unit_scales(case, extreme=False)
    codes = np.tile(np.arange(-8, 8), 32)
    weight = np.stack([np.roll(codes, shift) for shift in range(32)])
    zeros = np.arange(-8, 8)[:, None] + np.zeros((1, 32), int)
    factors = 127 // np.maximum(zeros + 8, 7 - zeros)
    changed = replace(operands, weight=weight, factors=(factors | zeros << 4).astype(np.int8))
    np.testing.assert_array_equal(kernels.run(changed), integers(changed).astype(np.float32))


def problem(**changed: object) -> LinearProblem:
    made = problem_of(Case("W4A8", rows=4, inputs=256, outputs=8, group=64))
    for name, value in changed.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"group": 48, "groups": 6}, "groups of 48: the kernel needs a multiple of 32"),
        ({"groups": 3}, "3 groups of 64 do not hold 256 elements"),
        ({"groups": 5}, "5 groups of 64 do not hold 256 elements"),
        ({"inputs": 250}, "rows of 250 elements: the kernel needs a multiple of 16"),
        ({"row_scales": 2}, "2 scales for a row of x, must be 1 or 4"),
        ({"format": 0, "two_level": True}, "factors widen 4-bit weights only"),
        ({"row_scales": 4, "asymmetric": True}, "zero points go with one scale for the row"),
        (
            {"group": 512, "groups": 2, "inputs": 1024},
            "groups of 512 with a scale each: the kernel takes up to 256",
        ),
        ({"group": 2**17, "groups": 1, "inputs": 2**17}, "overflow sums of 32 bits, which hold 131040"),
        ({"outputs": 2**23}, r"8388608 outputs is above 2\^30 elements"),
        ({"rows": -1}, "negative number of rows -1"),
        ({"outputs": 0}, "0 outputs, must be at least 1"),
    ],
)
def test_refusals_name_what_is_wrong(
    kernels: EmulatedLinear, changed: dict[str, object], complaint: str
) -> None:
    kernels.plan(problem())
    with pytest.raises(EmulatorError, match=f"QuantizedLinear: .*{complaint}"):
        kernels.plan(problem(**changed))


def test_room_for_the_most_rows_is_room_for_fewer(kernels: EmulatedLinear) -> None:
    largest = kernels.plan(problem(rows=1000, inputs=4096, group=64, groups=64, outputs=512), 132)[1]
    needs = [
        kernels.plan(problem(rows=rows, inputs=4096, group=64, groups=64, outputs=512), 132)[
            0
        ].workspace_bytes
        for rows in range(1001)
    ]
    assert largest == max(needs) > 0


def test_k_is_split_only_where_tiles_are_few(kernels: EmulatedLinear) -> None:
    wide = problem(rows=4096, inputs=4096, group=64, groups=64, outputs=14336)
    assert kernels.plan(wide, 132)[0].geometry.splits == 1
    narrow = problem(rows=1, inputs=14336, group=64, groups=224, outputs=4096)
    assert kernels.plan(narrow, 132)[0].geometry.splits == 4


def test_no_rows_are_no_work(kernels: EmulatedLinear) -> None:
    assert kernels.plan(problem(rows=0), 132)[0].workspace_bytes == 0
