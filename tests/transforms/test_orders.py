"""Hadamard matrices exist where the literature says, and are what their constructions promise."""

from __future__ import annotations

import numpy as np
import pytest

from rotexport.errors import TransformError
from rotexport.transforms import constructions
from rotexport.transforms.galois import character_matrix, prime_power
from rotexport.transforms.orders import base_matrix, base_order, hadamard_matrix, largest_block

# Widths of published models, and the split with the smallest base.
WIDTHS = {
    64: (1, 64),
    576: (36, 16),
    896: (28, 32),
    1152: (36, 32),
    1536: (12, 128),
    2880: (180, 16),
    3584: (28, 128),
    4864: (76, 64),
    5120: (20, 256),
    9728: (76, 128),
    10944: (684, 16),
    11008: (172, 64),
    13824: (108, 128),
    17408: (68, 256),
    18944: (148, 128),
    25600: (100, 256),
    29568: (924, 32),
}
CONSTRUCTED = {
    "paley_one": [4, 12, 20, 28, 44, 60, 84, 108, 140, 180, 684, 244],
    "paley_two": [12, 20, 28, 36, 52, 76, 100, 124, 148, 924],
    "williamson": [92, 116, 156, 172],
    "turyn": [188],
}


@pytest.mark.parametrize(("width", "split"), WIDTHS.items())
def test_widths_of_published_models_have_an_order(width: int, split: tuple[int, int]) -> None:
    assert base_order(width) == split


@pytest.mark.parametrize(("name", "m"), [(name, m) for name, orders in CONSTRUCTED.items() for m in orders])
def test_every_construction_gives_orthogonal_rows_of_signs(name: str, m: int) -> None:
    matrix = getattr(constructions, name)(m)
    assert_hadamard(matrix, m)


@pytest.mark.parametrize("n", [1, 2, 8, 12, 40, 72, 96, 188, 344, 1904])
def test_hadamard_matrix_is_the_base_times_sylvester(n: int) -> None:
    m, power = base_order(n)
    matrix = hadamard_matrix(n)
    assert_hadamard(matrix, n)
    rows, columns = np.divmod(np.arange(n), power)
    bits = np.array([[bin(i & j).count("1") % 2 for j in columns] for i in columns])
    assert np.array_equal(matrix, base_matrix(m)[np.ix_(rows, rows)] * (1 - 2 * bits))


def test_an_order_without_a_construction_of_its_own_is_a_product() -> None:
    own = (constructions.paley_one, constructions.paley_two, constructions.williamson, constructions.turyn)
    assert all(construct(1904) is None for construct in own)
    assert base_order(1904) == (1904, 1)  # 28 ⊗ 68


def test_paley_matrices_follow_their_definition() -> None:
    """Order 12: I + S with S bordered by squares modulo 11, which are 1, 3, 4, 5 and 9."""
    matrix = base_matrix(12)
    assert matrix[0].tolist() == [1] * 12
    assert matrix[1:, 0].tolist() == [-1] * 11
    assert [j for j in range(11) if matrix[1, 1 + j] == 1] == [0, 1, 3, 4, 5, 9]


@pytest.mark.parametrize(("p", "k"), [(3, 1), (11, 1), (3, 2), (5, 2), (7, 2), (3, 3), (3, 4), (5, 3)])
def test_the_quadratic_character_of_a_field(p: int, k: int) -> None:
    """Q Qᵀ = q I - J, rows sum to zero, Qᵀ = χ(-1) Q: this makes Paley's matrices orthogonal."""
    q = p**k
    matrix = character_matrix(p, k).astype(np.int64)
    assert np.array_equal(matrix @ matrix.T, q * np.eye(q) - np.ones((q, q)))
    assert not matrix.sum(axis=1).any()
    assert np.array_equal(matrix.T, matrix if q % 4 == 1 else -matrix)


def test_prime_powers() -> None:
    found = [q for q in range(60) if prime_power(q) is not None]
    primes = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59]
    assert found == sorted([*primes, 4, 8, 9, 16, 25, 27, 32, 49])
    assert prime_power(243) == (3, 5)


@pytest.mark.parametrize(
    ("width", "block"), [(13696, 128), (30, 2), (7, 1), (9 * 64, 576), (5 * 64, 320), (428, 4)]
)
def test_the_largest_block_divides_and_exists(width: int, block: int) -> None:
    assert largest_block(width) == block
    assert width % block == 0
    base_order(block)


@pytest.mark.parametrize("n", [3, 6, 9, 428, 13696])
def test_an_impossible_order_is_refused_with_the_block_that_works(n: int) -> None:
    with pytest.raises(TransformError, match=rf"order {n} .* order {largest_block(n)}$"):
        base_order(n)


@pytest.mark.parametrize("n", [0, -4])
def test_a_width_without_elements_is_refused(n: int) -> None:
    with pytest.raises(TransformError, match=f"order {n} "):
        base_order(n)
    with pytest.raises(TransformError, match=f"got {n}"):
        largest_block(n)


@pytest.mark.parametrize("m", [2, 8, 6, 428])
def test_only_bases_are_bases(m: int) -> None:
    with pytest.raises(TransformError, match=f"^{m} is not the order of a Hadamard base"):
        base_matrix(m)


def test_bases_are_shared_so_nobody_may_write_them() -> None:
    with pytest.raises(ValueError, match="read-only"):
        base_matrix(12)[0, 0] = 0


def assert_hadamard(matrix: np.ndarray, n: int) -> None:
    assert matrix.dtype == np.int8
    assert matrix.shape == (n, n)
    assert set(np.unique(matrix)) <= {-1, 1}
    exact = matrix.astype(np.float64)  # sums up to n are exact
    assert np.array_equal(exact @ exact.T, n * np.eye(n))
