"""The FastHadamard kernels on the emulator against float64 and against the operators' ONNX bodies."""

from __future__ import annotations

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulated import EmulatedKernels, EmulatorError
from fast_hadamard_cases import LARGEST_CODE, Case, run_body, sylvester, unpack_nibbles
from structures import HadamardProblem

from rotexport.errors import TransformError
from rotexport.transforms.orders import base_order

HALF, BFLOAT16, FLOAT = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
TYPES = [HALF, BFLOAT16, FLOAT]
EPSILON = {HALF: 2.0**-11, BFLOAT16: 2.0**-8, FLOAT: 2.0**-24}  # half a unit in the last place, relative

# Every instantiation and every edge of the matrix view: fewer than 4 elements, no columns, 2, 4, 8 columns, one and
# several warps a row, one tile of rows and many, ragged last units, several blocks in a row.
CASES = [
    Case(1, 1, rows=3, blocks=64),
    Case(1, 1, rows=5, blocks=12),
    Case(1, 2, rows=5, blocks=6),
    Case(1, 4, rows=7),
    Case(1, 8, rows=5, blocks=3),
    Case(1, 16, rows=33),
    Case(1, 32, rows=9, blocks=3),
    Case(1, 64, rows=70),
    Case(1, 128, rows=9, blocks=2),
    Case(1, 256, rows=5),
    Case(1, 512, rows=5, blocks=3),
    Case(1, 1024, rows=9),
    Case(1, 2048, rows=3, blocks=2),
    Case(1, 4096, rows=2, blocks=2),
    Case(1, 8192, rows=2),
    Case(1, 16384, rows=2),
    Case(1, 32768, rows=2),
    Case(12, 1, rows=7),
    Case(12, 2, rows=7, blocks=2),
    Case(12, 4, rows=7),
    Case(12, 64, rows=9, blocks=2),
    Case(12, 128, rows=9),
    Case(12, 2048, rows=1),
    Case(20, 1, rows=3, blocks=3),
    Case(28, 2, rows=3),
    Case(28, 512, rows=2),
    Case(36, 4, rows=3),
    Case(36, 16, rows=5, blocks=2),
    Case(76, 64, rows=2, blocks=2),
    Case(172, 64, rows=2),
    Case(140, 128, rows=1),
    Case(924, 32, rows=1),
]


@pytest.fixture(scope="module")
def kernels(emulated: Path) -> EmulatedKernels:
    return EmulatedKernels(emulated)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_transform_is_within_its_stated_error(kernels: EmulatedKernels, case: Case, dtype: np.dtype) -> None:
    """fast_hadamard.h states the bound before rounding; rounding adds half a unit of the output's type."""
    x, signs = case.inputs(dtype)
    y, _ = kernels.fast_hadamard(x, signs, case.matrix(), case.power)
    exact = case.reference(x, signs)
    smallest = 2.0**-25 if dtype == HALF else 0.0  # half a unit among the subnormals
    allowed = (1 + EPSILON[dtype]) * case.bound(x) + EPSILON[dtype] * np.abs(exact) + smallest
    assert np.all(np.abs(y.astype(np.float64) - exact) <= allowed)


@pytest.mark.parametrize("output", ["int8", "int4"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_are_the_exact_ones_except_at_ties(
    kernels: EmulatedKernels, case: Case, dtype: np.dtype, output: str
) -> None:
    x, signs = case.inputs(dtype, seed=1)
    clip = 0.9
    y, scale = kernels.fast_hadamard(x, signs, case.matrix(), case.power, output, clip=clip)
    codes = unpack_nibbles(y) if output == "int4" else y
    exact = case.reference(x, signs)
    largest = LARGEST_CODE[output]
    exact_scale = np.abs(exact).max(axis=1, keepdims=True) * np.float64(np.float32(clip)) / largest
    error = case.bound(x).max(axis=1, keepdims=True)
    assert np.all(np.abs(scale - exact_scale) <= clip / largest * error + 4 * 2.0**-24 * exact_scale)
    quotient = np.clip(exact / scale, -largest - 1, largest)
    # The quotient the kernel rounds is off by the transform's error and a few roundings of float32.
    slack = case.bound(x) / scale + 4 * 2.0**-24 * np.abs(quotient)
    assert np.all(np.abs(codes - quotient) <= 0.5 + slack)


@pytest.mark.parametrize("output", ["int8", "int4"])
@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[12], CASES[25], CASES[28]], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_codes_agree_with_the_onnx_body(
    kernels: EmulatedKernels, case: Case, dtype: np.dtype, output: str
) -> None:
    """Both compute in float32: codes differ by one at most, and only where float64 says it is close to a tie.

    ONNX Runtime has no bfloat16 input from NumPy, but the body widens its input first, so it may be widened before.
    """
    x, signs = case.inputs(dtype, seed=2)
    wide = (x.astype(np.float32), signs.astype(np.float32)) if dtype == BFLOAT16 else (x, signs)
    body_codes, body_scale = run_body(f"FastHadamardI{output[1:]}", case, *wide, clip=0.95)
    codes, scale = kernels.fast_hadamard(x, signs, case.matrix(), case.power, output, clip=0.95)
    assert codes.shape == body_codes.shape and scale.shape == body_scale.shape
    np.testing.assert_allclose(scale, body_scale, rtol=1e-5)
    if output == "int4":
        codes, body_codes = unpack_nibbles(codes), unpack_nibbles(body_codes)
    differs = codes != body_codes
    assert np.abs(codes.astype(int) - body_codes).max() <= 1
    quotient = (case.reference(x, signs) / scale)[differs]
    assert np.all(np.abs(np.abs(quotient - np.floor(quotient)) - 0.5) < 1e-2)
    assert differs.mean() < 1e-2


@pytest.mark.parametrize("case", [CASES[7], CASES[13], CASES[21], CASES[27]], ids=str)
def test_transform_agrees_with_the_onnx_body(kernels: EmulatedKernels, case: Case) -> None:
    """In float32: the kernel's stated bound, and as much again for the body's two dense products."""
    x, signs = case.inputs(FLOAT, seed=3)
    y, _ = kernels.fast_hadamard(x, signs, case.matrix(), case.power)
    body = run_body("FastHadamard", case, x, signs)[0]
    order = case.length  # of the body's sums, at most
    assert np.all(np.abs(y - body) <= (1 + order / 16) * case.bound(x))


@pytest.mark.parametrize("output", ["same", "int8", "int4"])
@pytest.mark.parametrize("case", [CASES[7], CASES[12], CASES[14], CASES[25], CASES[29]], ids=str)
def test_result_does_not_depend_on_the_schedule(kernels: EmulatedKernels, case: Case, output: str) -> None:
    x, signs = case.inputs(HALF, seed=4)
    first = kernels.fast_hadamard(x, signs, case.matrix(), case.power, output)
    for schedule in (1, 2):
        again = kernels.fast_hadamard(x, signs, case.matrix(), case.power, output, schedule=schedule)
        np.testing.assert_array_equal(first[0], again[0])
        if output != "same":
            np.testing.assert_array_equal(first[1], again[1])


@pytest.mark.parametrize("case", [CASES[7], CASES[8], CASES[11], CASES[21], CASES[27]], ids=str)
def test_rows_that_are_not_finite_leave_other_rows_alone(kernels: EmulatedKernels, case: Case) -> None:
    """Padding holds anything; a product of zero with it is a NaN, and must not reach another row."""
    x, signs = case.inputs(HALF, seed=5)
    clean, _ = kernels.fast_hadamard(x, signs, case.matrix(), case.power)
    x[1] = np.nan
    x[-1, 0] = np.inf
    y, _ = kernels.fast_hadamard(x, signs, case.matrix(), case.power)
    kept = [row for row in range(case.rows) if row not in (1, case.rows - 1)]
    np.testing.assert_array_equal(y[kept], clean[kept])
    assert np.isnan(y[1]).all()
    assert not np.isfinite(y[-1]).any() or case.blocks > 1


def test_a_row_that_is_not_finite_has_a_scale_that_says_so(kernels: EmulatedKernels) -> None:
    case = Case(1, 256, rows=3)
    x, signs = case.inputs(HALF)
    x[1, 7] = np.nan
    _, scale = kernels.fast_hadamard(x, signs, case.matrix(), case.power, "int8")
    np.testing.assert_array_equal(np.isnan(scale[:, 0]), [False, True, False])


@pytest.mark.parametrize("output", ["int8", "int4"])
def test_rows_of_zeros_have_codes_of_zero_and_a_finite_scale(kernels: EmulatedKernels, output: str) -> None:
    case = Case(1, 64, rows=3)
    x, signs = case.inputs(HALF)
    x[1] = 0
    codes, scale = kernels.fast_hadamard(x, signs, case.matrix(), case.power, output)
    assert not codes[1].any() and codes[0].any()
    assert scale[1, 0] == np.float32(2.0**-126)


@pytest.mark.parametrize(("output", "expected"), [("int8", [-128, 127]), ("int4", [-8, 7])])
def test_codes_beyond_the_clip_saturate(kernels: EmulatedKernels, output: str, expected: list[int]) -> None:
    case = Case(1, 1, rows=1, blocks=16)
    x = np.linspace(-1, 1, 16, dtype=np.float32)[None]
    codes, _ = kernels.fast_hadamard(x, np.ones(16, np.float32), case.matrix(), 1, output, clip=0.5)
    codes = unpack_nibbles(codes) if output == "int4" else codes
    assert codes[0, [0, -1]].tolist() == expected


def test_int4_keeps_the_even_element_in_the_low_nibble(kernels: EmulatedKernels) -> None:
    x = np.float32([[7, -1, 3, -8, 0, 5, 2, -3]])  # -8 is clipped to -7: the peak is 8, the scale 8/7
    codes, scale = kernels.fast_hadamard(x, np.ones(8, np.float32), np.ones((1, 1), np.int8), 1, "int4")
    exact = np.rint(x / scale).astype(int)[0]
    assert codes[0].view(np.uint8).tolist() == [
        exact[2 * i] & 15 | (exact[2 * i + 1] & 15) << 4 for i in range(4)
    ]


def test_any_base_matrix_is_taken_as_given(kernels: EmulatedKernels) -> None:
    """An imported matrix of order 4, not Sylvester's, and a base of order one with its sign."""
    base = np.int8([[1, 1, 1, -1], [1, 1, -1, 1], [-1, 1, 1, 1], [1, -1, 1, 1]])
    x = np.random.default_rng(6).standard_normal((5, 64)).astype(np.float32)
    signs = np.ones(64, np.float32)
    y, _ = kernels.fast_hadamard(x, signs, base, 8)
    dense = np.kron(base, sylvester(8)) / np.sqrt(32)
    np.testing.assert_allclose(y, (x.reshape(-1, 32) @ dense).reshape(x.shape), atol=1e-5)
    negative, _ = kernels.fast_hadamard(x, signs, np.int8([[-1]]), 64)
    positive, _ = kernels.fast_hadamard(x, signs, np.int8([[1]]), 64)
    np.testing.assert_array_equal(negative, -positive)


def test_every_length_that_the_compiler_folds_has_a_plan(kernels: EmulatedKernels) -> None:
    """All bases up to 256 and some large ones, with every power of two up to the longest length."""
    bases = [1, 428, 684, 924, 1252, *range(12, 257, 4)]
    lengths = [
        base << k
        for base in bases
        if base_order_or_none(base) == base
        for k in range(16)
        if base << k <= 32768
    ]
    for length in lengths:
        if length % 4:
            continue  # needs a row of several blocks
        base = base_order(length)[0]
        for output in (0, 1, 2):
            message = ctypes.create_string_buffer(256)
            problem = HadamardProblem(0, output, 8, length, base, length // base, 1.0)
            failed = kernels.library.emulated_plan(ctypes.byref(problem), message, ctypes.c_size_t(256))
            assert not failed, message.value
    assert len(lengths) > 250


def base_order_or_none(length: int) -> int | None:
    try:
        return base_order(length)[0]
    except TransformError:
        return None


@pytest.mark.parametrize("seed", range(6))
def test_random_lengths(kernels: EmulatedKernels, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = None
    while base is None:
        length = 4 * int(rng.integers(1, 1500))
        base = base_order_or_none(length)
    case = Case(base, length // base, rows=2, blocks=int(rng.integers(1, 3)))
    x, signs = case.inputs(HALF, seed)
    y, _ = kernels.fast_hadamard(x, signs, case.matrix(), case.power)
    exact = case.reference(x, signs)
    allowed = 2 * case.bound(x) + EPSILON[HALF] * np.abs(exact) + 2.0**-25
    assert np.all(np.abs(y.astype(np.float64) - exact) <= allowed)


@pytest.mark.parametrize(
    ("width", "base", "power", "clip", "complaint"),
    [
        (6, 6, 1, 1.0, "base order 6"),
        (12, 1, 12, 1.0, "12 of the Sylvester factors is no power of two"),
        (65536, 1, 65536, 1.0, "above 32768"),
        (96, 1, 64, 1.0, "96 elements, no multiple of the length 64"),
        (6, 1, 2, 1.0, "6 elements: the kernel needs a multiple of 4"),
        (64, 1, 64, 0.0, "clip 0.000000"),
        (64, 1, 64, 1.5, "clip 1.500000"),
        (64, 1, 64, float("nan"), "clip nan"),
    ],
)
def test_bad_problems_are_refused_with_the_value(
    kernels: EmulatedKernels, *, width: int, base: int, power: int, clip: float, complaint: str
) -> None:
    x = np.zeros((1, width), np.float16)
    with pytest.raises(EmulatorError, match=complaint):
        kernels.fast_hadamard(x, x[0], np.ones((base, base), np.int8), power, "int8", clip=clip)


def test_no_rows_is_no_work(kernels: EmulatedKernels) -> None:
    x = np.zeros((0, 64), np.float16)
    y, _ = kernels.fast_hadamard(x, np.ones(64, np.float16), np.ones((1, 1), np.int8), 64)
    assert y.shape == (0, 64)
