"""Lazy tensors: what an initializer will hold, as an expression over files.

A pass never touches numbers. It rewrites the expression of a weight ("this stored tensor, transposed,
scaled by that norm, rotated along axis 1"), and whoever writes the model evaluates it once, in float64,
slab by slab, rounding once to the final type. Two weights are equal when their expressions are, so equal
tensors are written once, and a pipeline that saves its graph after every pass writes only what changed.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from rotexport.errors import GraphError
from rotexport.transforms.transform import Transform

Array: TypeAlias = npt.NDArray[Any]

SLAB_ELEMENTS = 1 << 18  # float64 elements evaluated at a time: 2 MB, what a core's cache holds


class Weight(ABC):
    """An immutable tensor that is read when it is written out, and compared by how it is computed."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Element type of what `read` returns; `ml_dtypes` beyond NumPy's own."""

    @abstractmethod
    def read(self) -> Array:
        """Return the whole tensor, in `dtype`."""

    def slab(self, axis: int, start: int, stop: int) -> Array:
        """Return indices `start:stop` of `axis`, before the final rounding (float64 inside expressions).

        Valid for every axis that is not in `mixes`.
        """
        return _take(self.read(), axis, start, stop)

    @property
    def mixes(self) -> frozenset[int]:
        """Axes along which an element of the result depends on more than one element of a source."""
        return frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as ONNX stores it (4-bit elements packed in pairs)."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return (count + 1) // 2 if self.dtype.name in ("int4", "uint4") else count * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(Weight):
    """Raw little-endian elements in a file, memory mapped; `offset` in bytes."""

    path: Path
    offset: int
    stored_dtype: np.dtype[Any]
    stored_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stored_dtype

    def read(self) -> Array:
        return np.array(self._map())

    def slab(self, axis: int, start: int, stop: int) -> Array:
        return np.array(_take(self._map(), axis, start, stop))

    def _map(self) -> Array:
        count = int(np.prod(self.stored_shape, dtype=np.int64))
        if count == 0:
            return np.zeros(self.stored_shape, self.stored_dtype)
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (count * self.stored_dtype.itemsize,))
        return raw.view(self.stored_dtype).reshape(self.stored_shape)


@dataclass(frozen=True, eq=False)
class InMemory(Weight):
    """An array that is already here: small constants, or the parameters of a loaded model."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def read(self) -> Array:
        return self.array

    @cached_property
    def _digest(self) -> bytes:
        head = f"{self.array.dtype}{self.array.shape}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.array).tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InMemory) and (self.array is other.array or self._digest == other._digest)

    def __hash__(self) -> int:
        return hash(self._digest)


class Derived(Weight):
    """Base of float expressions: evaluated in float64 slabs, rounded once."""

    def read(self) -> Array:
        free = [axis for axis in range(len(self.shape)) if axis not in self.mixes]
        if not free or 0 in self.shape:
            return self._whole().astype(self.dtype)
        axis = max(free, key=lambda a: self.shape[a])
        length = self.shape[axis]
        step = max(1, SLAB_ELEMENTS * length // max(1, int(np.prod(self.shape, dtype=np.int64))))
        result = np.empty(self.shape, self.dtype)
        for start in range(0, length, step):
            stop = min(start + step, length)
            _take(result, axis, start, stop)[...] = self.slab(axis, start, stop)
        return result

    @abstractmethod
    def slab(self, axis: int, start: int, stop: int) -> Array: ...

    @abstractmethod
    def _whole(self) -> Array:
        """Evaluate everything at once: for expressions that mix every axis."""


def whole(weight: Weight) -> Array:
    """Evaluate a weight in float64, rounding only where a `Cast` says so."""
    values = weight._whole() if isinstance(weight, Derived) else weight.read()
    return values.astype(np.float64, copy=False)


def _slab64(weight: Weight, axis: int, start: int, stop: int) -> Array:
    return weight.slab(axis, start, stop).astype(np.float64, copy=False)


@dataclass(frozen=True)
class OfOne(Derived):
    """An expression over one weight; here what most of them keep."""

    weight: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.weight.dtype

    @property
    def mixes(self) -> frozenset[int]:
        return self.weight.mixes


@dataclass(frozen=True)
class Cast(OfOne):
    """The same numbers, rounded to another float type."""

    to: np.dtype[Any]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.to

    def slab(self, axis: int, start: int, stop: int) -> Array:
        return self.weight.slab(axis, start, stop).astype(self.to)

    def _whole(self) -> Array:
        return whole(self.weight).astype(self.to)


@dataclass(frozen=True)
class Transposed(OfOne):
    """A matrix [M, N] as [N, M]."""

    def __post_init__(self) -> None:
        if len(self.weight.shape) != 2:
            raise GraphError(f"only matrices are transposed lazily, got shape {self.weight.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape[::-1]

    @property
    def mixes(self) -> frozenset[int]:
        return frozenset(1 - axis for axis in self.weight.mixes)

    def slab(self, axis: int, start: int, stop: int) -> Array:
        return self.weight.slab(1 - axis, start, stop).T

    def _whole(self) -> Array:
        return whole(self.weight).T


@dataclass(frozen=True)
class Scaled(OfOne):
    """`weight` times the vector `by` along `axis`: diag(by) W for axis 0, W diag(by) for axis 1."""

    by: Weight
    axis: int

    def __post_init__(self) -> None:
        if self.by.shape != (self.weight.shape[self.axis],):
            raise GraphError(
                f"a scale of shape {self.by.shape} does not fit axis {self.axis} of {self.weight.shape}"
            )

    def slab(self, axis: int, start: int, stop: int) -> Array:
        factor = whole(self.by)
        if axis == self.axis:
            factor = factor[start:stop]
        return _slab64(self.weight, axis, start, stop) * self._along(factor)

    def _whole(self) -> Array:
        return whole(self.weight) * self._along(whole(self.by))

    def _along(self, factor: Array) -> Array:
        return factor.reshape([-1 if axis == self.axis else 1 for axis in range(len(self.shape))])


@dataclass(frozen=True)
class Affine(OfOne):
    """`factor * weight + offset` with scalars: Gemma's 1 + gamma, attention scales folded into a matrix."""

    factor: float = 1.0
    offset: float = 0.0

    def slab(self, axis: int, start: int, stop: int) -> Array:
        return _slab64(self.weight, axis, start, stop) * self.factor + self.offset

    def _whole(self) -> Array:
        return whole(self.weight) * self.factor + self.offset


@dataclass(frozen=True)
class Folded(OfOne):
    """`weight` with every row vector along `axis` multiplied by a transform: v -> v T.

    A producer's matrix takes `axis=1` (W T); a consumer's takes T^-T along `axis=0` (T^-1 W), which is T
    itself when T is orthogonal.
    """

    transform: Transform
    axis: int

    def __post_init__(self) -> None:
        if self.weight.shape[self.axis] != self.transform.size:
            raise GraphError(
                f"a transform of size {self.transform.size} does not fit "
                f"axis {self.axis} of {self.weight.shape}"
            )

    @property
    def mixes(self) -> frozenset[int]:
        return self.weight.mixes | {self.axis}

    def slab(self, axis: int, start: int, stop: int) -> Array:
        part = _slab64(self.weight, axis, start, stop)
        return self._fold(part)

    def _whole(self) -> Array:
        return self._fold(whole(self.weight))

    def _fold(self, values: Array) -> Array:
        last = len(self.shape) - 1
        if self.axis == last:
            return self.transform.apply(values)
        return np.swapaxes(self.transform.apply(np.swapaxes(values, self.axis, last)), self.axis, last)


@dataclass(frozen=True)
class Centered(OfOne):
    """`weight` minus its mean along `axis`: a LayerNorm's mean subtraction, pushed into a producer."""

    axis: int

    @property
    def mixes(self) -> frozenset[int]:
        return self.weight.mixes | {self.axis}

    def slab(self, axis: int, start: int, stop: int) -> Array:
        return self._center(_slab64(self.weight, axis, start, stop))

    def _whole(self) -> Array:
        return self._center(whole(self.weight))

    def _center(self, values: Array) -> Array:
        centered: Array = values - values.mean(axis=self.axis, keepdims=True)
        return centered


@dataclass(frozen=True)
class BiasThrough(Derived):
    """`bias + shift W`: a norm's shift [K] carried through the matrix [K, N] that consumes it, shape [N]."""

    shift: Weight
    weight: Weight
    bias: Weight | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.weight.dtype

    @property
    def mixes(self) -> frozenset[int]:
        return frozenset({0})

    def slab(self, axis: int, start: int, stop: int) -> Array:
        return _take(self._whole(), axis, start, stop)

    def _whole(self) -> Array:
        carried: Array = whole(self.shift) @ whole(self.weight)
        return carried if self.bias is None else carried + whole(self.bias)


def transpose(weight: Weight) -> Weight:
    """Return an expression of the transposed matrix, with no `Transposed` where one can be avoided."""
    if isinstance(weight, Transposed):
        return weight.weight
    if isinstance(weight, Cast):
        return Cast(transpose(weight.weight), weight.to)
    if isinstance(weight, (Folded, Scaled, Centered)):
        return replace(weight, weight=transpose(weight.weight), axis=1 - weight.axis)
    return Transposed(weight)


@dataclass(frozen=True)
class _Unloaded:
    """Stands where graphsurgeon expects a TensorProto; replaced by the writer before export."""

    name: str = field(default="")


class LazyWeight(LazyValues):  # type: ignore[misc]  # graphsurgeon ships no types
    """graphsurgeon's hook for values that stay outside the graph: the writer fills in `tensor`."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.tensor: onnx.TensorProto | _Unloaded = _Unloaded()
        self.shape = weight.shape
        self.dtype = weight.dtype
        self.nbytes = weight.nbytes

    def load(self) -> Array:
        """Evaluate the weight (graphsurgeon calls this when somebody asks for `.values`)."""
        return self.weight.read()


def constant(name: str, weight: Weight) -> gs.Constant:
    """Return a graphsurgeon constant whose values stay lazy."""
    return gs.Constant(name, LazyWeight(weight))


def weight_of(tensor: gs.Constant) -> Weight:
    """Return the expression behind a constant without loading it."""
    values = tensor._values
    if isinstance(values, LazyWeight):
        return values.weight
    if isinstance(values, np.ndarray):
        return InMemory(values)
    return InMemory(values.load())


def set_weight(tensor: gs.Constant, weight: Weight) -> None:
    """Replace the expression behind a constant."""
    tensor.values = LazyWeight(weight)


def _take(values: Array, axis: int, start: int, stop: int) -> Array:
    index: list[slice] = [slice(None)] * values.ndim
    index[axis] = slice(start, stop)
    return values[tuple(index)]
