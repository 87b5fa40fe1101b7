"""Hadamard transforms: of an axis, in blocks, behind random signs, or over heads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from rotexport.transforms import online
from rotexport.transforms.base import Identity, Orthogonal, Transform, quotient
from rotexport.transforms.composites import KroneckerPair
from rotexport.transforms.fwht import fwht
from rotexport.transforms.online import Online
from rotexport.transforms.orders import base_matrix, base_order, largest_block

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Hadamard(Orthogonal):
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
        quotient(self.size, self.block)

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
        x = self.checked(x)
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
class HeadMix(Orthogonal):
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
