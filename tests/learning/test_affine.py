"""Learned affine transforms are invertible and leave products as they are, at any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotexport.learning.affine import Factor, KroneckerAffine, kronecker, kronecker_sizes


def moved(size: int, seed: int) -> KroneckerAffine:
    """A transform as training might leave it."""
    generator = torch.Generator().manual_seed(seed)
    affine = KroneckerAffine(torch.rand(size, generator=generator) + 0.5, seed)
    for parameter in affine.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return affine.double()


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 90), seed=st.integers(0, 99))
def test_the_product_stays_whatever_was_learned(size: int, seed: int) -> None:
    affine = moved(size, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, size, dtype=torch.float64, generator=generator)
    weight = torch.randn(size, 3, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(affine(x) @ affine.into_weight(weight), x @ weight, atol=1e-9, rtol=1e-9)


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 60), seed=st.integers(0, 99))
def test_the_exported_transform_is_the_learned_one(size: int, seed: int) -> None:
    affine = moved(size, seed)
    x = np.random.default_rng(seed).standard_normal((4, size))
    weight = np.random.default_rng(seed + 1).standard_normal((size, 2))
    with torch.no_grad():
        expected, folded = affine(torch.from_numpy(x)).numpy(), affine.into_weight(torch.from_numpy(weight))
    transform = affine.transform()
    np.testing.assert_allclose(transform.apply(x), expected, atol=1e-10)
    np.testing.assert_allclose(
        transform.contragredient().fold_into(weight, 0, np.float64), folded.numpy(), atol=1e-8
    )
    np.testing.assert_allclose(transform.inverse().apply(expected), x, atol=1e-8)


def test_it_is_dense_and_not_orthogonal_once_moved() -> None:
    dense = moved(12, 0).transform().dense()
    left = dense.reshape(3, 4, 3, 4)[0, 0]
    assert (np.abs(left) > 1e-9).all()
    assert np.abs(dense @ dense.T - np.eye(12)).max() > 0.1


@pytest.mark.parametrize(
    ("size", "pair"), [(2048, (32, 64)), (11008, (86, 128)), (576, (24, 24)), (7, (1, 7)), (1, (1, 1))]
)
def test_factors_are_as_near_to_square_as_can_be(size: int, pair: tuple[int, int]) -> None:
    assert kronecker_sizes(size) == pair


def test_gradients_reach_every_part() -> None:
    affine = KroneckerAffine(torch.ones(12), 0)
    affine(torch.randn(3, 12, generator=torch.Generator().manual_seed(0))).pow(4).sum().backward()
    for name, parameter in affine.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def moved_factor(size: int, seed: int) -> Factor:
    factor, generator = Factor(size, seed), torch.Generator().manual_seed(seed)
    for parameter in factor.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return factor.double()


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 70), seed=st.integers(0, 99))
def test_queries_and_keys_meet_as_before_whatever_was_learned(size: int, seed: int) -> None:
    factor, generator = moved_factor(size, seed), torch.Generator().manual_seed(seed + 1)
    query, key = (torch.randn(4, size, dtype=torch.float64, generator=generator) for _ in range(2))
    logits = (query @ factor.contragredient()) @ (key @ factor.matrix()).mT
    torch.testing.assert_close(logits, query @ key.mT, atol=1e-9, rtol=1e-9)
    np.testing.assert_allclose(factor.exact(), factor.matrix().detach().numpy(), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(1, 13), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_mixed_heads_are_undone_in_the_weight(heads: int, size: int, seed: int) -> None:
    factor, generator = moved_factor(heads, seed), torch.Generator().manual_seed(seed + 1)
    x = torch.randn(5, heads * size, dtype=torch.float64, generator=generator)
    weight = torch.randn(heads * size, 3, dtype=torch.float64, generator=generator)
    mixed, matrix = kronecker(x, factor.matrix(), None), factor.matrix().detach()
    dense = torch.kron(matrix, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(mixed, x @ dense, atol=1e-9, rtol=1e-9)
    undone = kronecker(weight.mT, factor.contragredient(), None).mT
    torch.testing.assert_close(mixed @ undone, x @ weight, atol=1e-8, rtol=1e-8)
