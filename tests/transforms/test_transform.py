"""Transforms are linear maps with an inverse that fold without changing what a model computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotexport.errors import TransformError
from rotexport.transforms.orders import hadamard_matrix
from rotexport.transforms.transform import (
    BlockDiagonal,
    Composition,
    Diagonal,
    Hadamard,
    HeadMix,
    Identity,
    InvertibleMatrix,
    KroneckerPair,
    OrthogonalMatrix,
    Permutation,
    Transform,
)

SIZES = [1, 2, 4, 12, 24, 28, 40, 56, 92, 100, 116, 144, 188]


def well_conditioned(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.standard_normal((size, size)) + 3 * np.sqrt(size) * np.eye(size)


def leaf(rng: np.random.Generator, size: int) -> Transform:
    makers: list[Callable[[], Transform]] = [
        lambda: Identity(size),
        lambda: Hadamard.of(size, seed=int(rng.integers(100))),
        lambda: Hadamard.of(size).inverse(),
        lambda: OrthogonalMatrix.random(size, int(rng.integers(100))),
        lambda: InvertibleMatrix(well_conditioned(rng, size)),
        lambda: Diagonal(rng.uniform(0.5, 2, size) * rng.choice([-1, 1], size)),
        lambda: Permutation(rng.permutation(size)),
    ]
    return makers[rng.integers(len(makers))]()


def composite(rng: np.random.Generator, size: int) -> Transform:
    divisor = int(rng.choice([d for d in range(1, size + 1) if size % d == 0]))
    makers: list[Callable[[], Transform]] = [
        lambda: leaf(rng, size),
        lambda: KroneckerPair(leaf(rng, divisor), leaf(rng, size // divisor)),
        lambda: BlockDiagonal(leaf(rng, divisor), size // divisor),
        lambda: Composition(tuple(leaf(rng, size) for _ in range(rng.integers(1, 4)))),
    ]
    return makers[rng.integers(len(makers))]()


transforms = st.builds(
    lambda size, seed: composite(np.random.default_rng(seed), size),
    st.sampled_from(SIZES),
    st.integers(0, 2**32 - 1),
)
many = settings(deadline=None, max_examples=80)


@many
@given(transforms)
def test_inverse_contragredient_and_orthogonality(transform: Transform) -> None:
    dense, unit = transform.dense(), np.eye(transform.size)
    np.testing.assert_allclose(dense @ transform.inverse().dense(), unit, atol=1e-9)
    np.testing.assert_allclose(dense.T @ transform.contragredient().dense(), unit, atol=1e-9)
    assert transform.orthogonal == np.allclose(dense @ dense.T, unit, atol=1e-9)


@many
@given(transforms, st.lists(st.integers(0, 3), max_size=2))
def test_apply_is_the_dense_product(transform: Transform, rows: list[int]) -> None:
    x = np.random.default_rng(1).standard_normal((*rows, transform.size))
    np.testing.assert_allclose(transform.apply(x), x @ transform.dense(), atol=1e-9)
    single = transform.apply(x.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, x @ transform.dense(), rtol=1e-4, atol=1e-3)


@many
@given(transforms)
def test_producer_and_consumer_fold_to_the_same_function(transform: Transform) -> None:
    """(u W₁ T + b T) (T⁻¹ W₂) = (u W₁ + b) W₂."""
    rng = np.random.default_rng(2)
    u, first = rng.standard_normal((3, 5)), rng.standard_normal((5, transform.size))
    bias, second = rng.standard_normal(transform.size), rng.standard_normal((transform.size, 7))
    hidden = u @ transform.fold_into(first, 1, np.float64) + transform.fold_into(bias, 0, np.float64)
    folded = hidden @ transform.contragredient().fold_into(second, 0, np.float64)
    np.testing.assert_allclose(folded, (u @ first + bias) @ second, atol=1e-8)


@many
@given(transforms)
def test_equal_by_value(transform: Transform) -> None:
    again = transform.inverse().inverse()
    if not isinstance(transform, Diagonal | InvertibleMatrix | KroneckerPair | BlockDiagonal | Composition):
        assert again == transform  # without arithmetic, to the last bit
    assert hash(transform) == hash(transform)
    assert transform != Identity(transform.size + 1)


def test_transforms_of_equal_numbers_are_one_key() -> None:
    numbers = np.random.default_rng(0).permutation(12)
    assert len({Permutation(numbers), Permutation(numbers.copy()), Permutation(numbers[::-1])}) == 2
    assert Diagonal(np.arange(1.0, 4)) != Permutation(np.arange(3))
    assert len({Hadamard(24, 12, 1), Hadamard(24, 12, 1), Hadamard(24, 12, 2), Hadamard(24, 24, 1)}) == 3


def test_arrays_are_copied_and_kept_from_change() -> None:
    numbers = np.array([2.0, 4.0])
    diagonal = Diagonal(numbers)
    numbers[0] = 9
    assert diagonal.apply(np.ones(2)).tolist() == [2, 4]
    with pytest.raises(ValueError, match="read-only"):
        diagonal.values[0] = 1


class TestHadamard:
    @pytest.mark.parametrize(("size", "block"), [(576, 576), (576, 64), (40, 20), (12, 4), (6, 2)])
    def test_signs_then_blocks(self, size: int, block: int) -> None:
        transform = Hadamard(size, block, seed=7)
        blocks = np.kron(np.eye(size // block), hadamard_matrix(block)) / np.sqrt(block)
        np.testing.assert_allclose(transform.dense(), transform.signs[:, None] * blocks, atol=1e-12)

    def test_signs_depend_on_the_seed_alone(self) -> None:
        """Fixed for ever: a rotated checkpoint must meet the same signs on another machine."""
        drawn = "".join("-" if sign < 0 else "+" for sign in Hadamard(16, 16, 0).signs)
        assert drawn == "+--+++-+-+++---+"
        assert np.array_equal(Hadamard(32, 32, 0).signs[:16], Hadamard(16, 16, 0).signs)
        assert not np.array_equal(Hadamard(32, 32, 1).signs, Hadamard(32, 32, 0).signs)
        assert abs(int(Hadamard(8192, 8192, 3).signs.sum())) < 500  # five standard deviations

    def test_without_a_seed_there_are_no_signs(self) -> None:
        np.testing.assert_allclose(Hadamard(12, 12).dense(), hadamard_matrix(12) / np.sqrt(12), atol=1e-12)

    @pytest.mark.parametrize(("size", "block"), [(576, 576), (13696, 128), (30, 2)])
    def test_of_takes_the_largest_block(self, size: int, block: int) -> None:
        assert Hadamard.of(size, seed=1) == Hadamard(size, block, 1)

    def test_of_keeps_an_asked_block(self) -> None:
        assert Hadamard.of(576, 64) == Hadamard(576, 64)

    def test_an_impossible_block_is_refused(self) -> None:
        with pytest.raises(TransformError, match="order 6 "):
            Hadamard(36, 6)
        with pytest.raises(TransformError, match="blocks of 64 do not divide a width of 100"):
            Hadamard(100, 64)

    def test_describes_itself(self) -> None:
        assert Hadamard(1536, 1536).describe() == "Hadamard 1536 = 12·128"
        assert Hadamard(576, 64, 1).describe() == "Hadamard 64, 9 blocks, random signs"


class TestHeadMix:
    def test_mixes_heads_at_each_position(self) -> None:
        x = np.random.default_rng(0).standard_normal((2, 12 * 5))
        mixed = np.einsum("nhd,hk->nkd", x.reshape(2, 12, 5), hadamard_matrix(12) / np.sqrt(12))
        np.testing.assert_allclose(HeadMix(12, 5).apply(x), mixed.reshape(2, 60), atol=1e-12)

    def test_completes_the_rotation_of_each_head(self) -> None:
        """(I ⊗ H_d)(H_h ⊗ I) = H_h ⊗ H_d: values rotated per head, then mixed, are rotated as a whole."""
        per_head = BlockDiagonal(Hadamard(8, 8), 12)
        both = Composition((per_head, HeadMix(12, 8))).dense()
        whole = np.kron(hadamard_matrix(12), hadamard_matrix(8)) / np.sqrt(96)
        np.testing.assert_allclose(both, whole, atol=1e-12)

    def test_inverse(self) -> None:
        x = np.random.default_rng(0).standard_normal(60)
        np.testing.assert_allclose(HeadMix(12, 5).inverse().apply(HeadMix(12, 5).apply(x)), x, atol=1e-12)

    def test_a_head_count_without_an_order_is_refused(self) -> None:
        with pytest.raises(TransformError, match="order 9 "):
            HeadMix(9, 64)


class TestFoldInto:
    def test_any_axis(self) -> None:
        transform = Hadamard(12, 12, 1)
        weight = np.random.default_rng(0).standard_normal((3, 12, 5))
        expected = np.einsum("akb,kj->ajb", weight, transform.dense())
        np.testing.assert_allclose(transform.fold_into(weight, 1, np.float64), expected, atol=1e-12)
        np.testing.assert_allclose(transform.fold_into(weight, -2, np.float64), expected, atol=1e-12)

    def test_rounds_once_from_float64(self) -> None:
        transform = Hadamard(12, 12, 1)
        weight = np.random.default_rng(0).standard_normal((7, 12)).astype(np.float16)
        exact = weight.astype(np.float64) @ transform.dense()
        folded = transform.fold_into(weight, 1)
        assert folded.dtype == np.float32
        np.testing.assert_allclose(folded, exact, rtol=2.0**-24, atol=1e-15)
        assert transform.fold_into(weight, 1, np.float16).dtype == np.float16

    @pytest.mark.parametrize("axis", [0, 1])
    def test_pieces_meet(self, axis: int) -> None:
        transform = Hadamard(64, 64, 1)
        weight = np.random.default_rng(0).standard_normal((70_000, 64)).astype(np.float32)  # three pieces
        weight = weight if axis == 1 else np.ascontiguousarray(weight.T)
        exact = weight @ transform.dense() if axis == 1 else transform.dense().T @ weight
        np.testing.assert_allclose(transform.fold_into(weight, axis), exact, rtol=1e-6, atol=1e-6)

    def test_memory_stays_below_a_copy_in_float64(self) -> None:
        tracemalloc = pytest.importorskip("tracemalloc")
        weight = np.ones((40_000, 1024), np.float16)  # 82 MB; 328 MB in float64
        transform = Hadamard(1024, 1024, 1)
        tracemalloc.start()
        transform.fold_into(weight, 1, np.float16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < weight.nbytes + (24 << 20)

    def test_a_wrong_axis_is_refused(self) -> None:
        with pytest.raises(TransformError, match=r"size 12 does not fit axis 0 of shape \(5, 12\)"):
            Hadamard(12, 12).fold_into(np.ones((5, 12)), 0)


class TestLifted:
    def test_repeats_over_a_wider_axis(self) -> None:
        transform = OrthogonalMatrix.random(4, 0)
        np.testing.assert_allclose(transform.lifted(12).dense(), np.kron(np.eye(3), transform.dense()))
        assert Identity(4).lifted(12) == Identity(12)

    def test_is_itself_at_its_own_width(self) -> None:
        transform = Hadamard(12, 12, 3)
        assert transform.lifted(12) is transform

    def test_a_width_it_does_not_divide_is_refused(self) -> None:
        with pytest.raises(TransformError, match="blocks of 8 do not divide a width of 12"):
            Hadamard(8, 8).lifted(12)


class TestRefusals:
    def test_a_matrix_that_is_not_orthogonal(self) -> None:
        with pytest.raises(TransformError, match=r"not orthogonal.* 0\.2.*InvertibleMatrix"):
            OrthogonalMatrix(np.array([[1, 0.2], [0, 1]]))
        OrthogonalMatrix(np.array([[1, 1e-7], [0, 1]]))  # as near as float32 comes

    def test_a_singular_matrix(self) -> None:
        with pytest.raises(TransformError, match="size 2 cannot be inverted"):
            InvertibleMatrix(np.ones((2, 2)))
        with pytest.raises(TransformError, match="size 2 cannot be inverted"):
            InvertibleMatrix(np.full((2, 2), np.nan))

    def test_a_matrix_that_is_not_square(self) -> None:
        with pytest.raises(TransformError, match=r"square, got shape \(2, 3\)"):
            OrthogonalMatrix(np.ones((2, 3)))

    def test_a_zero_on_the_diagonal(self) -> None:
        with pytest.raises(TransformError, match=r"entry 1 of a diagonal is 0\.0"):
            Diagonal(np.array([1, 0, 2]))

    def test_indices_that_are_no_permutation(self) -> None:
        with pytest.raises(TransformError, match="3 indices are not a permutation"):
            Permutation(np.array([0, 2, 2]))

    def test_factors_of_different_sizes(self) -> None:
        with pytest.raises(TransformError, match=r"one size, got \[2, 3\]"):
            Composition((Identity(2), Identity(3)))
        with pytest.raises(TransformError, match="one size, got none"):
            Composition(())

    def test_no_blocks(self) -> None:
        with pytest.raises(TransformError, match="at least one block, got 0"):
            BlockDiagonal(Identity(2), 0)

    def test_vectors_of_another_length(self) -> None:
        with pytest.raises(TransformError, match="size 12 does not fit vectors of length 13"):
            Hadamard(12, 12).apply(np.ones(13))


def test_random_orthogonal_matrices_follow_their_seed() -> None:
    assert OrthogonalMatrix.random(9, 1) == OrthogonalMatrix.random(9, 1)
    assert OrthogonalMatrix.random(9, 1) != OrthogonalMatrix.random(9, 2)
