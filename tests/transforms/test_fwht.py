"""The fast transform against products with dense matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotexport.errors import TransformError
from rotexport.transforms.constructions import sylvester
from rotexport.transforms.fwht import fwht
from rotexport.transforms.orders import base_matrix, base_order, hadamard_matrix

ORDERS = [1, 2, 4, 12, 20, 28, 36, 40, 64, 92, 100, 116, 128, 148, 172, 180, 188, 344, 576, 1152]


@settings(deadline=None, max_examples=60)
@given(
    n=st.sampled_from(ORDERS),
    blocks=st.integers(1, 3),
    rows=st.lists(st.integers(0, 4), max_size=3),
    transpose=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_block_is_multiplied_by_the_matrix(
    n: int, blocks: int, rows: list[int], transpose: bool, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((*rows, blocks * n))
    matrix = hadamard_matrix(n).astype(np.float64) / np.sqrt(n)
    expected = x.reshape(*rows, blocks, n) @ (matrix.T if transpose else matrix)
    result = fwht(x, n, transpose=transpose)
    assert result.dtype == np.float64
    # n sums of unit normal terms: rounding stays far below 1e-12 at these lengths.
    np.testing.assert_allclose(result, expected.reshape(x.shape), atol=1e-12)


@pytest.mark.parametrize("n", [2880, 4864, 11008, 18944, 32768, 29568])
def test_large_orders(n: int) -> None:
    """Unit vectors pick rows of the matrix; transforming back returns to the start."""
    m, power = base_order(n)
    for index in (0, 1, n // 3, n - 1):
        unit = np.zeros(n)
        unit[index] = 1
        signs = [(-1) ** (index % power & column).bit_count() for column in range(power)]
        row = np.kron(base_matrix(m)[index // power], signs)
        np.testing.assert_allclose(fwht(unit, n) * np.sqrt(n), row, atol=1e-12)
    x = np.random.default_rng(n).standard_normal((3, n))
    np.testing.assert_allclose(fwht(fwht(x, n), n, transpose=True), x, atol=1e-12)


def test_many_rows_are_worked_through_in_pieces() -> None:
    x = np.random.default_rng(1).standard_normal((4000, 576))  # more than two pieces
    np.testing.assert_allclose(fwht(x, 576), x @ hadamard_matrix(576) / 24, atol=1e-12)


def test_float32_stays_float32() -> None:
    x = np.random.default_rng(2).standard_normal((8, 1536)).astype(np.float32)
    result = fwht(x, 1536)
    assert result.dtype == np.float32
    # Three stages of sums; relative to the norm, which spreads evenly, a few units of 2^-24 each.
    np.testing.assert_allclose(result, fwht(x.astype(np.float64), 1536), atol=4e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_other_types_are_computed_in_float64(dtype: type) -> None:
    x = np.arange(-12, 12).astype(dtype).reshape(2, 12)
    np.testing.assert_array_equal(fwht(x, 12), fwht(x.astype(np.float64), 12))


def test_views_and_the_input_are_left_alone() -> None:
    x = np.random.default_rng(3).standard_normal((24, 5))
    before = x.copy()
    np.testing.assert_allclose(fwht(x.T, 12), fwht(np.ascontiguousarray(x.T), 12))
    assert np.array_equal(x, before)


def test_an_imported_base_is_used_as_given() -> None:
    base = base_matrix(12)[:, ::-1]
    x = np.random.default_rng(4).standard_normal((2, 48))
    expected = x @ np.kron(base, sylvester(4)) / np.sqrt(48)
    np.testing.assert_allclose(fwht(x, 48, base=base), expected, atol=1e-12)


def test_the_matrix_of_a_skew_base_is_not_its_transpose() -> None:
    """Guards the tests above: with symmetric bases a confusion of both directions would pass."""
    x = np.random.default_rng(5).standard_normal(12)
    assert not np.allclose(fwht(x, 12), fwht(x, 12, transpose=True))


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(TransformError, match=r"blocks of 12 do not divide an axis of length 32"):
        fwht(np.ones(32), 12)


@pytest.mark.parametrize("n", [36, 30, 6])
def test_a_base_that_does_not_fit_is_refused(n: int) -> None:
    with pytest.raises(TransformError, match=f"base of order 12 .* order {n}"):
        fwht(np.ones(n), n, base=base_matrix(12))
