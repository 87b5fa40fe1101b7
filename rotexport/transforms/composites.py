"""Transforms made of transforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from rotexport.errors import TransformError
from rotexport.transforms import online
from rotexport.transforms.base import Transform
from rotexport.transforms.matrices import Diagonal
from rotexport.transforms.online import Online

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class KroneckerPair(Transform):
    """T = A ⊗ B: with x as a matrix X [a, b], X → Aᵀ X B, in a b (a + b) operations at most (FlatQuant)."""

    left: Transform
    right: Transform

    def __post_init__(self) -> None:
        self._set_size(self.left.size * self.right.size)

    @property
    def orthogonal(self) -> bool:
        return self.left.orthogonal and self.right.orthogonal

    def apply(self, x: Array) -> Array:
        matrices = self.checked(x).reshape(*x.shape[:-1], self.left.size, self.right.size)
        matrices = self.right.apply(matrices)
        return self.left.apply(matrices.swapaxes(-1, -2)).swapaxes(-1, -2).reshape(x.shape)

    def inverse(self) -> KroneckerPair:
        return KroneckerPair(self.left.inverse(), self.right.inverse())

    def contragredient(self) -> KroneckerPair:
        return KroneckerPair(self.left.contragredient(), self.right.contragredient())

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        nodes, matrices = online.reshape(f"{name}.matrices", x, [-1, self.left.size, self.right.size])
        right, matrices = self.right.online_nodes(f"{name}.right", matrices)
        left, matrices = online.matmul_left(f"{name}.left", matrices, self.left.dense().T)
        back, result = online.reshape_like(name, matrices, x)
        return nodes + right + left + back, result

    def describe(self) -> str:
        return f"{self.left.describe()} ⊗ {self.right.describe()}"


@dataclass(frozen=True)
class ScaledKronecker(Transform):
    """T = diag(c) (A ⊗ B): what FlatQuant learns for an input; one operator where it runs online.

    `scale` is None where there is none, or what writes x has taken it up.

    Raises:
        TransformError: sizes differ.

    """

    scale: Diagonal | None
    pair: KroneckerPair

    def __post_init__(self) -> None:
        self._set_size(self.pair.size)
        if self.scale is not None and self.scale.size != self.size:
            raise TransformError(f"a scale of {self.scale.size} does not fit vectors of length {self.size}")

    @property
    def orthogonal(self) -> bool:
        return (self.scale is None or self.scale.orthogonal) and self.pair.orthogonal

    def apply(self, x: Array) -> Array:
        return self.pair.apply(x if self.scale is None else self.scale.apply(x))

    def inverse(self) -> Composition:
        scales = () if self.scale is None else (self.scale.inverse(),)
        return Composition((self.pair.inverse(), *scales))

    def contragredient(self) -> ScaledKronecker:
        scale = None if self.scale is None else self.scale.inverse()
        return ScaledKronecker(scale, self.pair.contragredient())

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        scale = np.ones(1) if self.scale is None else self.scale.values
        return online.kronecker(name, x, scale, self.pair.left.dense(), self.pair.right.dense())

    def describe(self) -> str:
        return self.pair.describe() if self.scale is None else f"scaled {self.pair.describe()}"


@dataclass(frozen=True)
class Composition(Transform):
    """T = T₁ T₂ … : the first factor acts first.

    Raises:
        TransformError: there is no factor, or sizes differ.

    """

    factors: tuple[Transform, ...]

    def __post_init__(self) -> None:
        sizes = {factor.size for factor in self.factors}
        if len(sizes) != 1:
            raise TransformError(f"a composition needs factors of one size, got {sorted(sizes) or 'none'}")
        self._set_size(sizes.pop())

    @property
    def orthogonal(self) -> bool:
        return all(factor.orthogonal for factor in self.factors)

    def apply(self, x: Array) -> Array:
        for factor in self.factors:
            x = factor.apply(x)
        return x

    def inverse(self) -> Composition:
        return Composition(tuple(factor.inverse() for factor in reversed(self.factors)))

    def contragredient(self) -> Composition:
        return Composition(tuple(factor.contragredient() for factor in self.factors))

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        nodes: list[gs.Node] = []
        for index, factor in enumerate(self.factors, 1):
            last = index == len(self.factors)
            more, x = factor.online_nodes(name if last else f"{name}.{index}", x)
            nodes += more
        return nodes, x

    def describe(self) -> str:
        return ", then ".join(factor.describe() for factor in self.factors)
