"""Transforms given by numbers: matrices learned or drawn, diagonals, permutations."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from rotexport.errors import TransformError
from rotexport.transforms import online
from rotexport.transforms.base import Orthogonal, Transform
from rotexport.transforms.online import Online

Array: TypeAlias = npt.NDArray[Any]

ORTHOGONALITY = 1e-5  # largest tolerated entry of T Tᵀ - I: what matrices learned in float32 reach


@dataclass(frozen=True, eq=False)
class _Tabled(Transform):
    """A transform given by numbers: compared by them, and the owner of a copy that nobody can write."""

    values: Array

    def _own(self, values: Array, dtype: npt.DTypeLike) -> None:
        owned = np.array(values, dtype)
        owned.flags.writeable = False
        object.__setattr__(self, "values", owned)
        self._set_size(len(owned))

    @cached_property
    def _digest(self) -> bytes:
        head = f"{type(self).__name__}{self.values.shape}".encode()
        return hashlib.sha256(head + self.values.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tabled) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)


@dataclass(frozen=True, eq=False)
class OrthogonalMatrix(_Tabled, Orthogonal):
    """T = a dense orthogonal matrix [size, size], learned or random.

    Raises:
        TransformError: the matrix is not square, or not orthogonal.

    """

    def __post_init__(self) -> None:
        self._own(_square(self.values), np.float64)
        error = np.abs(self.values @ self.values.T - np.eye(self.size)).max()
        if not error <= ORTHOGONALITY:
            raise TransformError(
                f"a matrix of size {self.size} is not orthogonal: T Tᵀ differs from I by {error:.2g}; "
                "orthonormalize it (QR), or use InvertibleMatrix"
            )

    @classmethod
    def random(cls, size: int, seed: int) -> OrthogonalMatrix:
        """Draw from the uniform (Haar) distribution: Q of a Gaussian matrix, R's diagonal made positive."""
        q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
        return cls(q * np.sign(np.diagonal(r)))

    def apply(self, x: Array) -> Array:
        return _times(self.checked(x), self.values)

    def inverse(self) -> OrthogonalMatrix:
        return OrthogonalMatrix(self.values.T)

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        return online.dense(name, x, self.values)

    def describe(self) -> str:
        return f"orthogonal {self.size}x{self.size}"


@dataclass(frozen=True, eq=False)
class InvertibleMatrix(_Tabled):
    """T = a dense invertible matrix [size, size]; inverted in float64.

    Raises:
        TransformError: the matrix is not square, or too near a singular one for float64.

    """

    def __post_init__(self) -> None:
        self._own(_square(self.values), np.float64)
        condition = np.linalg.cond(self.values) if np.isfinite(self.values).all() else np.inf
        if not condition < 1e12:
            raise TransformError(
                f"a matrix of size {self.size} cannot be inverted: its condition number is {condition:.2g}"
            )

    @property
    def orthogonal(self) -> bool:
        return False

    def apply(self, x: Array) -> Array:
        return _times(self.checked(x), self.values)

    def inverse(self) -> InvertibleMatrix:
        return InvertibleMatrix(np.linalg.inv(self.values))

    def contragredient(self) -> InvertibleMatrix:
        return InvertibleMatrix(np.linalg.inv(self.values).T)

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        return online.dense(name, x, self.values)

    def describe(self) -> str:
        return f"invertible {self.size}x{self.size}"


@dataclass(frozen=True, eq=False)
class Diagonal(_Tabled):
    """T = diag(d), d [size] without zeros.

    Raises:
        TransformError: an entry is zero or not finite.

    """

    def __post_init__(self) -> None:
        self._own(self.values, np.float64)
        bad = np.flatnonzero(~np.isfinite(self.values) | (self.values == 0))
        if bad.size:
            raise TransformError(
                f"entry {bad[0]} of a diagonal is {self.values[bad[0]]}, which has no inverse"
            )

    @property
    def orthogonal(self) -> bool:
        return bool((np.abs(self.values) == 1).all())

    def apply(self, x: Array) -> Array:
        x = self.checked(x)
        product: Array = x * self.values.astype(x.dtype)
        return product

    def inverse(self) -> Diagonal:
        return Diagonal(1 / self.values)

    def contragredient(self) -> Diagonal:
        return self.inverse()

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        return online.multiply(name, x, self.values)

    def describe(self) -> str:
        return f"diagonal {self.size}"


@dataclass(frozen=True, eq=False)
class Permutation(_Tabled, Orthogonal):
    """(x T)[j] = x[p[j]] for a permutation p of 0 .. size - 1.

    Raises:
        TransformError: an index is missing or appears twice.

    """

    def __post_init__(self) -> None:
        self._own(self.values, np.int64)
        if not np.array_equal(np.sort(self.values), np.arange(self.size)):
            raise TransformError(f"{self.size} indices are not a permutation of 0 .. {self.size - 1}")

    def apply(self, x: Array) -> Array:
        return np.take(self.checked(x), self.values, axis=-1)

    def inverse(self) -> Permutation:
        return Permutation(np.argsort(self.values))

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        return online.gather(name, x, self.values)

    def describe(self) -> str:
        return f"permutation {self.size}"


def _times(x: Array, matrix: Array) -> Array:
    product: Array = x @ matrix.astype(x.dtype, copy=False)
    return product


def _square(matrix: Array) -> Array:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise TransformError(f"a transform's matrix must be square, got shape {matrix.shape}")
    return matrix
