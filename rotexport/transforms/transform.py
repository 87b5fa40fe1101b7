"""Invertible linear maps of an axis, as objects that fold into weights or run online.

All act on row vectors, x → x T. Between a producer y = u W₁ and a consumer z = y W₂,

    z = (u W₁ T) (T⁻¹ W₂),

so the producer's weight [K, N] becomes W₁ T: every row times T, `T.fold_into(W₁, axis=1)`, a bias likewise
(axis 0). The consumer's becomes T⁻¹ W₂ = (W₂ᵀ T⁻ᵀ)ᵀ: every column, as a row vector, times the contragredient
T⁻ᵀ, `T.contragredient().fold_into(W₂, axis=0)`. An orthogonal T is its own contragredient.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from rotexport.errors import TransformError
from rotexport.transforms import online
from rotexport.transforms.fwht import fwht
from rotexport.transforms.orders import base_matrix, base_order, largest_block

Array: TypeAlias = npt.NDArray[Any]
Online: TypeAlias = "tuple[list[gs.Node], gs.Variable]"

FOLD_ELEMENTS = 1 << 21  # held in float64 at a time while folding: 16 MB, and a few temporaries of that size
ORTHOGONALITY = 1e-5  # largest tolerated entry of T Tᵀ - I: what matrices learned in float32 reach


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
        return BlockDiagonal(self, _quotient(width, self.size))

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

    def _check(self, x: Array) -> Array:
        if x.shape[-1] != self.size:
            raise TransformError(
                f"a transform of size {self.size} does not fit vectors of length {x.shape[-1]}"
            )
        return x if x.dtype == np.float32 else x.astype(np.float64, copy=False)

    def _set_size(self, size: int) -> None:
        object.__setattr__(self, "size", size)


@dataclass(frozen=True)
class _Orthogonal(Transform):
    @property
    def orthogonal(self) -> bool:
        return True

    def contragredient(self) -> Transform:
        return self


@dataclass(frozen=True)
class Identity(_Orthogonal):
    """T = I."""

    size: int

    def apply(self, x: Array) -> Array:
        return self._check(x)

    def inverse(self) -> Transform:
        return self

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        return [], x

    def describe(self) -> str:
        return "identity"

    def lifted(self, width: int) -> Transform:
        _quotient(width, self.size)
        return Identity(width)


@dataclass(frozen=True)
class Hadamard(_Orthogonal):
    """T = diag(s) · blockdiag(H, …, H) / √block: random signs, then a Hadamard matrix per block.

    Signs are drawn from `seed`, the same on every machine, or all +1 without one. `transposed` gives the
    inverse Tᵀ = blockdiag(Hᵀ, …) diag(s) / √block.

    Raises:
        TransformError: no Hadamard matrix of order `block` exists here, or it does not divide `size`.

    """

    size: int
    block: int
    seed: int | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        base_order(self.block)
        _quotient(self.size, self.block)

    @classmethod
    def of(cls, size: int, block: int | None = None, seed: int | None = None) -> Hadamard:
        """Return the transform of `size` with blocks as large as possible where no block is given."""
        return cls(size, largest_block(size) if block is None else block, seed)

    @cached_property
    def signs(self) -> Array:
        """The vector s, int8 [size] of ±1."""
        if self.seed is None:
            return np.ones(self.size, np.int8)
        # A hash rather than a generator of NumPy's, whose streams may change between releases.
        stream = hashlib.shake_128(str(self.seed).encode()).digest(-(-self.size // 8))
        bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=self.size)
        return (1 - 2 * bits.astype(np.int8)).astype(np.int8)

    def apply(self, x: Array) -> Array:
        x = self._check(x)
        if self.transposed:
            y = fwht(x, self.block, transpose=True)
            return y if self.seed is None else np.multiply(y, self.signs, out=y)
        return fwht(x if self.seed is None else x * self.signs.astype(x.dtype), self.block)

    def inverse(self) -> Hadamard:
        return replace(self, transposed=not self.transposed)

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        m, power = base_order(self.block)
        base = base_matrix(m)
        if not self.transposed:
            return online.fast_hadamard(name, x, self.signs, base, power)
        if self.seed is None:
            return online.fast_hadamard(name, x, self.signs, base.T, power)
        nodes, mixed = online.fast_hadamard(f"{name}.mixed", x, np.ones_like(self.signs), base.T, power)
        signed, result = online.multiply(name, mixed, self.signs)
        return nodes + signed, result

    def describe(self) -> str:
        m, power = base_order(self.block)
        order = f"{self.block} = {m}·{power}" if m > 1 else str(self.block)
        blocks = f", {self.size // self.block} blocks" if self.block < self.size else ""
        signs = ", random signs" if self.seed is not None else ""
        return f"Hadamard {order}{blocks}{signs}"


@dataclass(frozen=True)
class HeadMix(_Orthogonal):
    """T = H_heads/√heads ⊗ I: mixes the heads of a [heads · head_size] axis (QuaRot, stage 1c).

    Raises:
        TransformError: no Hadamard matrix of order `heads` exists here.

    """

    heads: int
    head_size: int

    def __post_init__(self) -> None:
        base_order(self.heads)
        self._set_size(self.heads * self.head_size)

    @cached_property
    def pair(self) -> KroneckerPair:
        """The same map as a Kronecker pair."""
        return KroneckerPair(Hadamard(self.heads, self.heads), Identity(self.head_size))

    def apply(self, x: Array) -> Array:
        return self.pair.apply(x)

    def inverse(self) -> Transform:
        return self.pair.inverse()

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        return self.pair.online_nodes(name, x)

    def describe(self) -> str:
        return f"Hadamard over {self.heads} heads"


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
class OrthogonalMatrix(_Tabled, _Orthogonal):
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
        return _times(self._check(x), self.values)

    def inverse(self) -> OrthogonalMatrix:
        return OrthogonalMatrix(self.values.T)

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        return online.matmul(name, x, self.values)

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
        return _times(self._check(x), self.values)

    def inverse(self) -> InvertibleMatrix:
        return InvertibleMatrix(np.linalg.inv(self.values))

    def contragredient(self) -> InvertibleMatrix:
        return InvertibleMatrix(np.linalg.inv(self.values).T)

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        return online.matmul(name, x, self.values)

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
        x = self._check(x)
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
class Permutation(_Tabled, _Orthogonal):
    """(x T)[j] = x[p[j]] for a permutation p of 0 .. size - 1.

    Raises:
        TransformError: an index is missing or appears twice.

    """

    def __post_init__(self) -> None:
        self._own(self.values, np.int64)
        if not np.array_equal(np.sort(self.values), np.arange(self.size)):
            raise TransformError(f"{self.size} indices are not a permutation of 0 .. {self.size - 1}")

    def apply(self, x: Array) -> Array:
        return np.take(self._check(x), self.values, axis=-1)

    def inverse(self) -> Permutation:
        return Permutation(np.argsort(self.values))

    def online_nodes(self, name: str, x: gs.Variable) -> Online:
        return online.gather(name, x, self.values)

    def describe(self) -> str:
        return f"permutation {self.size}"


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
        matrices = self._check(x).reshape(*x.shape[:-1], self.left.size, self.right.size)
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
        blocks = self._check(x).reshape(*x.shape[:-1], self.repeats, self.inner.size)
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


def _times(x: Array, matrix: Array) -> Array:
    product: Array = x @ matrix.astype(x.dtype, copy=False)
    return product


def _square(matrix: Array) -> Array:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise TransformError(f"a transform's matrix must be square, got shape {matrix.shape}")
    return matrix


def _quotient(width: int, size: int) -> int:
    if size < 1 or width < 1 or width % size:
        raise TransformError(f"blocks of {size} do not divide a width of {width}")
    return width // size
