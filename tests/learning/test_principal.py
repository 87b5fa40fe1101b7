"""Principal rotations: least error by the formula, and a network that they leave as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from rotexport.build import build
from rotexport.errors import RecipeError
from rotexport.learning.principal import Moments, balance, geometric_mean, principal_directions
from rotexport.recipe import from_mapping


def moments_of(size: int, seed: int = 0) -> Moments:
    """Of uneven inputs and weights."""
    generator = np.random.default_rng(seed)
    pair = []
    for _ in range(2):
        root = generator.standard_normal((size, size)) * generator.lognormal(0, 1.5, (size, 1))
        pair.append(torch.from_numpy(root.T @ root / np.sum(root * root)))
    return Moments(*pair)


def cost(moments: Moments, transform: torch.Tensor) -> float:
    """Of rounding behind a transform T: tr(Tᵀ S T) tr(T⁻¹ M T⁻ᵀ)."""
    inverse = torch.linalg.inv(transform)
    first = (transform.mT @ moments.inputs @ transform).trace()
    return float(first * (inverse @ moments.weights @ inverse.mT).trace())


def nudged(size: int, seed: int) -> torch.Tensor:
    step = torch.from_numpy(np.random.default_rng(seed).standard_normal((size, size)))
    return torch.linalg.matrix_exp(0.1 * step / size**0.5)


def test_balance_is_the_scale_of_least_error() -> None:
    moments = moments_of(12)
    rotation = principal_directions([moments])
    scale = balance(moments, rotation)
    least = cost(moments, rotation * scale)
    power, weight = ((rotation.mT @ m @ rotation).diagonal() for m in (moments.inputs, moments.weights))
    assert least == pytest.approx(float((power * weight).sqrt().sum() ** 2))
    assert least < 0.5 * cost(moments, rotation)
    for seed in range(5):
        other = scale * torch.from_numpy(np.random.default_rng(seed).uniform(0.9, 1.1, 12))
        assert cost(moments, rotation * other) > least


@pytest.mark.parametrize("size", [3, 12])
def test_the_geometric_mean_has_the_least_error_of_all_transforms(size: int) -> None:
    moments = moments_of(size)
    best = geometric_mean(moments)
    root = torch.linalg.cholesky(moments.inputs)
    nuclear = torch.linalg.svdvals(root.mT @ torch.linalg.cholesky(moments.weights)).sum()
    assert cost(moments, best) == pytest.approx(float(nuclear**2), rel=1e-4)
    assert all(cost(moments, best @ nudged(size, seed)) > cost(moments, best) for seed in range(5))
    assert cost(moments, best) <= cost(
        moments, principal_directions([moments]) * balance(moments, principal_directions([moments]))
    )


def test_where_inputs_and_weights_are_even_there_is_nothing_to_balance() -> None:
    even = torch.eye(8, dtype=torch.float64) / 8
    moments = Moments(even, even)
    torch.testing.assert_close(balance(moments, even * 8), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(geometric_mean(moments), even * 8)


@pytest.mark.parametrize(("model_type", "mixed"), [("llama", "none"), ("qwen2", "hadamard")])  # qwen2: biases
def test_a_float_network_stays_as_it_is(model_type: str, mixed: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, initializer_range=0.3)
    rotations = {"r1": "principal", "r2": "principal", "r4": "hadamard", "o_heads": mixed}
    recipe = {"dtype": "fp32", "rotations": rotations, "weights": {"format": "int8"}}
    report = build(model, tmp_path / "rotated", from_mapping(recipe))
    assert report.proof is not None and report.proof.comparison.sqnr_db > 25  # passes are checked one by one
    placed = {(placement.rotation, placement.site, placement.where) for placement in report.transforms}
    assert {
        ("r1", "residual", "folded"),
        ("r2", "1.value", "folded"),
        ("affine", "0.gate", "online"),
    } <= placed


def test_a_dense_rotation_does_not_run_online() -> None:
    with pytest.raises(RecipeError, match=r"rotations\.r4: 'principal' is dense"):
        from_mapping({"rotations": {"r4": "principal"}})
