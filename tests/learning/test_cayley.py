"""Cayley SGD stays orthogonal, descends, and finds what it should."""

import itertools

import pytest
import torch
from torch import nn

from rotexport.learning.cayley import CayleySGD, cayley, cayley_step, nearest_orthogonal


def random_orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nearest_orthogonal(torch.randn(size, size, dtype=torch.float64, generator=generator))


def deviation(matrix: torch.Tensor) -> float:
    matrix = matrix.detach().double()
    return float((matrix @ matrix.mT - torch.eye(matrix.shape[-1], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("size", [1, 2, 7, 24])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stays_orthogonal_over_many_steps(size: int, momentum: float) -> None:
    parameter = nn.Parameter(random_orthogonal(size).float())
    target = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    optimizer = CayleySGD([parameter], lr=1.5, momentum=momentum)
    for _ in range(200):
        optimizer.zero_grad()
        ((parameter - target) ** 2).sum().backward()
        optimizer.step()
    assert deviation(optimizer.state[parameter]["point"]) < 1e-10
    assert deviation(parameter) < 1e-6  # the float32 copy of an orthogonal matrix


def test_descends_to_the_nearest_rotation() -> None:
    """|R - T|² over rotations is least at T's polar factor when that has R's determinant (Procrustes)."""
    start = random_orthogonal(6)
    skew = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    target = cayley(0.8 * (skew - skew.mT)) @ start
    parameter = nn.Parameter(start.clone())
    optimizer = CayleySGD([parameter], lr=0.2)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = ((parameter - target) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))
    torch.testing.assert_close(parameter.detach(), target, atol=1e-5, rtol=0)


def test_a_stack_of_matrices_moves_as_each_alone() -> None:
    points = torch.stack([random_orthogonal(5, seed) for seed in range(3)])
    velocities = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    together, _ = cayley_step(points, velocities, lr=0.3)
    alone = [cayley_step(p, v, lr=0.3)[0] for p, v in zip(points, velocities, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_first_order_change_is_the_projected_gradient() -> None:
    """For small steps R moves by lr · A R with A the skew part of V Rᵀ, twice (formula of the paper)."""
    point, velocity = random_orthogonal(8), torch.randn(8, 8, dtype=torch.float64)
    moved, tangent = cayley_step(point, velocity, lr=1e-6)
    half = velocity @ point.mT / 2
    torch.testing.assert_close(tangent, (half - half.mT) @ point)
    torch.testing.assert_close((moved - point) / 1e-6, tangent, atol=1e-4, rtol=1e-4)


def test_no_gradient_no_move() -> None:
    parameter = nn.Parameter(random_orthogonal(4))
    before = parameter.detach().clone()
    CayleySGD([parameter], lr=1.0).step()
    assert torch.equal(parameter, before)
