"""A learned invertible map x → (x ⊙ c)(A ⊗ B) of a linear's input (FlatQuant, arXiv 2410.09426, section 3).

Each factor is U diag(s) Vᵀ with orthogonal U and V. Those are Cayley transforms of skew-symmetric matrices,
so any optimizer may move them, and the inverse is V diag(1/s) Uᵀ: nothing is ever inverted numerically while
learning. s and c are trained by their logarithms, so the map stays invertible.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rotexport.learning.cayley import cayley
from rotexport.transforms.transform import (
    Diagonal,
    InvertibleMatrix,
    KroneckerPair,
    ScaledKronecker,
    Transform,
)


def kronecker_sizes(size: int) -> tuple[int, int]:
    """Return a ≤ b with a · b = size and the least sum: the cheapest pair of factors."""
    left = next(a for a in range(int(size**0.5), 0, -1) if size % a == 0)
    return left, size // left


class Factor(nn.Module):  # type: ignore[misc]  # torch is Any here
    """An invertible matrix [n, n], U diag(s) Vᵀ, that starts as a random rotation, U and s at one."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.left = nn.Parameter(torch.zeros(size, size))
        self.right = nn.Parameter(torch.randn(size, size, generator=generator) / size**0.5)
        self.log_scale = nn.Parameter(torch.zeros(size))

    def matrix(self) -> Tensor:
        """Return U diag(s) Vᵀ."""
        left, right = self._rotations()
        return (left * self.log_scale.exp()) @ right

    def contragredient(self) -> Tensor:
        """Return the inverse's transpose, U diag(1/s) Vᵀ."""
        left, right = self._rotations()
        return (left * (-self.log_scale).exp()) @ right

    def exact(self) -> Any:
        """Return the matrix as a float64 array."""
        with torch.no_grad():
            return copy.deepcopy(self).double().matrix().numpy()

    def _rotations(self) -> tuple[Tensor, Tensor]:
        return cayley(self.left - self.left.mT), cayley(self.right - self.right.mT)


class KroneckerAffine(nn.Module):  # type: ignore[misc]  # torch is Any here
    """x → (x ⊙ c)(A ⊗ B), and its contragredient for the weight that reads it."""

    def __init__(self, scale: Tensor, seed: int) -> None:
        """Start from the scales c [size], all positive."""
        super().__init__()
        left, right = kronecker_sizes(len(scale))
        self.left, self.right = Factor(left, seed), Factor(right, seed + 1)
        self.log_scale = nn.Parameter(scale.float().log())

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., size] transformed."""
        return kronecker(x * self.log_scale.exp(), self.left.matrix(), self.right.matrix())

    def into_weight(self, weight: Tensor) -> Tensor:
        """Return T⁻¹ W for a weight [size, N]: what reads the transformed input."""
        columns = weight.mT * (-self.log_scale).exp()
        return kronecker(columns, self.left.contragredient(), self.right.contragredient()).mT

    def transform(self) -> Transform:
        """Return the map with its numbers in float64."""
        factors = [InvertibleMatrix(factor.exact()) for factor in (self.left, self.right)]
        scale = self.log_scale.detach().double().exp().numpy()
        return ScaledKronecker(Diagonal(scale), KroneckerPair(*factors))


def kronecker(x: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """Return x (A ⊗ B): with x as a matrix X [a, b], Aᵀ X B; B is the identity where `right` is None."""
    matrices = x.unflatten(-1, (len(left), -1))
    return (left.mT @ (matrices if right is None else matrices @ right)).flatten(-2)
