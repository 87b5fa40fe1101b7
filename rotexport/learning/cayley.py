"""Cayley SGD: gradient descent over orthogonal matrices (Li et al., arXiv 2002.01113; SpinQuant's optimizer).

For a loss L at an orthogonal R with gradient G = dL/dR, the momentum V ← μ V − G gives a direction V of
descent. Its part along the manifold is A R with the skew-symmetric

    Ŵ = V Rᵀ − ½ R Rᵀ V Rᵀ,    A = Ŵ − Ŵᵀ,

and the Cayley transform of α A moves R along it without leaving the manifold:

    R ← (I − ½ α A)⁻¹ (I + ½ α A) R,    α = min(lr, 1 / ‖A‖₁).

The linear system is solved rather than iterated: exact for any step, and cheap beside a network's gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_NORM = 1e-8


class CayleySGD(torch.optim.Optimizer):  # type: ignore[misc]  # torch is Any here
    """SGD with momentum over orthogonal matrices [n, n], or stacks of them [..., n, n].

    Points are kept in float64, whatever the type of the parameters, so that rounding does not add up.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group["lr"], group["momentum"])

    def _move(self, parameter: nn.Parameter, lr: float, momentum: float) -> None:
        state: dict[str, Any] = self.state[parameter]
        point = state.get("point")
        if point is None:
            point = nearest_orthogonal(parameter.double())
        velocity = -parameter.grad.double()
        if momentum and "velocity" in state:
            velocity += momentum * state["velocity"]
        moved, tangent = cayley_step(point, velocity, lr)
        state["point"] = moved
        if momentum:
            state["velocity"] = tangent
        parameter.copy_(moved)


def cayley_step(point: Tensor, velocity: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """Return R moved along V by at most `lr`, and the part of V along the manifold, A R; both [..., n, n]."""
    along = velocity @ point.mT
    along = along - 0.5 * (point @ point.mT) @ along
    skew = along - along.mT
    norm = skew.abs().sum(-2).amax(-1)  # the largest column sum
    rate = (1 / (norm + SMALLEST_NORM)).clamp(max=lr)[..., None, None]
    return cayley(rate * skew) @ point, skew @ point


def cayley(skew: Tensor) -> Tensor:
    """Return the orthogonal matrix (I − ½ A)⁻¹ (I + ½ A) of a skew-symmetric A [..., n, n]."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity - skew / 2, identity + skew / 2)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to `matrix` [..., n, n] in the Frobenius norm (polar factor)."""
    left, _, right = torch.linalg.svd(matrix)
    nearest: Tensor = left @ right
    return nearest
