"""Invertible linear maps of an axis, as objects that fold into weights or run online.

All act on row vectors, x → x T. Between a producer y = u W₁ and a consumer z = y W₂,

    z = (u W₁ T) (T⁻¹ W₂),

so the producer's weight [K, N] becomes W₁ T: every row times T, `T.fold_into(W₁, axis=1)`, a bias likewise
(axis 0). The consumer's becomes T⁻¹ W₂ = (W₂ᵀ T⁻ᵀ)ᵀ: every column, as a row vector, times the contragredient
T⁻ᵀ, `T.contragredient().fold_into(W₂, axis=0)`. An orthogonal T is its own contragredient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from rotexport.errors import TransformError
from rotexport.transforms import online
from rotexport.transforms.online import Online

Array: TypeAlias = npt.NDArray[Any]

FOLD_ELEMENTS = (
    1 << 18
)  # held in float64 at a time while folding: a few 2 MB temporaries, which stay in the cache


@dataclass(frozen=True)
class Transform(ABC):
    """An invertible map x → x T of row vectors of length `size`; compared and hashed by value."""

    size: int = field(init=False)

    @property
    @abstractmethod
    def orthogonal(self) -> bool:
        """Whether T Tᵀ = I."""

    @abstractmethod
    def apply(self, x: Array) -> Array:
        """Return x T for x [..., size]: float32 stays float32, all else is computed in float64."""

    @abstractmethod
    def inverse(self) -> Transform:
        """Return T⁻¹."""

    @abstractmethod
    def contragredient(self) -> Transform:
        """Return T⁻ᵀ, which a consumer's weight takes along its axis 0."""

    @abstractmethod
    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        """Return nodes that compute x T, and their result named `name`; no nodes and x where T = I."""

    @abstractmethod
    def describe(self) -> str:
        """Return one phrase for reports."""

    def dense(self) -> Array:
        """Return T as float64 [size, size]."""
        return self.apply(np.eye(self.size))

    def lifted(self, width: int) -> Transform:
        """Return the transform of a `width` that holds `size` side by side, once per head or group.

        Raises:
            TransformError: `size` does not divide `width`.

        """
        if width == self.size:
            return self
        return BlockDiagonal(self, quotient(width, self.size))

    def fold_into(self, weight: Array, axis: int, out_dtype: npt.DTypeLike = np.float32) -> Array:
        """Return `weight` with every vector along `axis` times T, in float64, rounded once to `out_dtype`.

        Works through a few MB at a time, so a memory-mapped weight costs no more than its result.

        Raises:
            TransformError: the axis is not `size` long.

        """
        if weight.shape[axis] != self.size:
            raise TransformError(
                f"a transform of size {self.size} does not fit axis {axis} of shape {weight.shape}"
            )
        result = np.empty(weight.shape, out_dtype)
        self._fold(np.moveaxis(weight, axis, -1), np.moveaxis(result, axis, -1))
        return result

    def _fold(self, source: Array, target: Array) -> None:
        if source.ndim == 1 or source.size <= FOLD_ELEMENTS:
            target[...] = self.apply(source.astype(np.float64))
            return
        step = max(1, FOLD_ELEMENTS * len(source) // source.size)
        for start in range(0, len(source), step):
            part = slice(start, start + step) if step > 1 else start
            self._fold(source[part], target[part])

    def checked(self, x: Array) -> Array:
        """Return `x` in the type it is computed in; raise TransformError where its vectors do not fit."""
        if x.shape[-1] != self.size:
            raise TransformError(
                f"a transform of size {self.size} does not fit vectors of length {x.shape[-1]}"
            )
        return x if x.dtype == np.float32 else x.astype(np.float64, copy=False)

    def _set_size(self, size: int) -> None:
        object.__setattr__(self, "size", size)


@dataclass(frozen=True)
class Orthogonal(Transform):
    """A map with T Tᵀ = I, which is its own contragredient."""

    @property
    def orthogonal(self) -> bool:
        return True

    def contragredient(self) -> Transform:
        return self


@dataclass(frozen=True)
class Identity(Orthogonal):
    """T = I."""

    size: int

    def apply(self, x: Array) -> Array:
        return self.checked(x)

    def inverse(self) -> Transform:
        return self

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        return [], x

    def describe(self) -> str:
        return "identity"

    def lifted(self, width: int) -> Transform:
        quotient(width, self.size)
        return Identity(width)


@dataclass(frozen=True)
class BlockDiagonal(Transform):
    """T = diag(A, …, A): `repeats` copies of one transform side by side."""

    inner: Transform
    repeats: int

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise TransformError(f"a block-diagonal transform needs at least one block, got {self.repeats}")
        self._set_size(self.inner.size * self.repeats)

    @property
    def orthogonal(self) -> bool:
        return self.inner.orthogonal

    def apply(self, x: Array) -> Array:
        blocks = self.checked(x).reshape(*x.shape[:-1], self.repeats, self.inner.size)
        return self.inner.apply(blocks).reshape(x.shape)

    def inverse(self) -> BlockDiagonal:
        return BlockDiagonal(self.inner.inverse(), self.repeats)

    def contragredient(self) -> BlockDiagonal:
        return BlockDiagonal(self.inner.contragredient(), self.repeats)

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        nodes, blocks = online.reshape(f"{name}.blocks", x, [-1, self.inner.size])
        inner, blocks = self.inner.online_nodes(f"{name}.inner", blocks)
        back, result = online.reshape_like(name, blocks, x)
        return nodes + inner + back, result

    def describe(self) -> str:
        return f"{self.inner.describe()}, {self.repeats} times"


def quotient(width: int, size: int) -> int:
    """Return how often `size` fits into `width`.

    Raises:
        TransformError: it does not divide it.

    """
    if size < 1 or width < 1 or width % size:
        raise TransformError(f"blocks of {size} do not divide a width of {width}")
    return width // size
