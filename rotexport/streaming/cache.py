"""The bounded cache of one layer: which tensors it is made of, how they are packed, how much they take.

Per head there are `sinks` slots in floating point and a ring of `window` slots; token j >= sinks lives in
slot (j - sinks) mod window. A ring in b bits holds, for each token and head,

    codes  int8 [size b / 8]    level - 2^(b-1) in two's complement, b bits each, the first channel lowest
    scale  [groups, 2]          scale and minimum of each group of channels: x = level scale + minimum

where level = round((x - minimum) / scale) in 0 ... 2^b - 1. A ring in fp8 holds float8e4m3fn numbers

    codes  int8 [size]          their bytes
    scale  [groups, 1]          largest magnitude of each group of channels / 448: x = number scale

A second, short ring may hold the `recent` newest
tokens in floating point. With an eviction policy slots hold any tokens, in floating point, and beside them

    position  int32    1 + position of the token, 0 for an empty slot
    score     float32  what it drew of attention, all along; or `observed`, what the end of the prompt gave it

This is the layout of the operators' inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.errors import RecipeError
from rotexport.quant.scheme import Group, group_size
from rotexport.streaming.eviction import OPERATORS, RING, Eviction

BITS: Final = {"none": None, "int8": 8, "int4": 4, "int2": 2, "fp8": 8}
INT8: Final = np.dtype(np.int8)
KINDS: Final = ("key", "value")


@dataclass(frozen=True)
class CacheFormat:
    """How the ring is stored.

    `bits` None is the type of activations; `group` None the whole head. The `recent` newest tokens are kept
    in the type of activations beside the codes; `center` stores keys minus their calibrated mean, which turns
    with their positions. `fp8` codes are float8 numbers, not levels of a grid.
    """

    bits: int | None = None
    group: Group = None
    recent: int = 0
    center: bool = False
    fp8: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.recent, bool) or not isinstance(self.recent, int) or self.recent < 0:
            raise RecipeError(f"kv_cache.recent: {self.recent!r} is not a number of tokens")
        if self.bits is None and (self.recent or self.center):
            raise RecipeError("kv_cache.recent and kv_cache.center need a quantized cache; set its format")
        if self.fp8 and (self.bits != BITS["fp8"] or self.recent or self.center):
            raise RecipeError(
                "kv_cache: fp8 stores every token of the window, as it is, in 8 bits; "
                "set recent to 0 and center to false, or use int8"
            )

    @classmethod
    def named(cls, name: str, group: Group = None, recent: int = 0, center: bool = False) -> CacheFormat:
        """Return the format that recipes call `none`, `int8`, `int4`, `int2` or `fp8`."""
        if name not in BITS:
            raise RecipeError(f"kv_cache: streaming stores {', '.join(BITS)}, not {name!r}")
        return cls(BITS[name], group, recent, center, name == "fp8")

    @property
    def name(self) -> str:
        """What recipes call the format of codes."""
        if self.bits is None:
            return "none"
        return "fp8" if self.fp8 else f"int{self.bits}"

    @property
    def operator(self) -> str:
        """The custom operator that reads and writes this format."""
        if self.bits is None:
            return "SinkWindowAttention"
        options = f"{'Centered' if self.center else ''}{'Recent' if self.recent else ''}"
        return f"SinkWindowAttention{self.name.capitalize()}{options}"


FLOAT_CACHE: Final = CacheFormat()
INT32: Final = np.dtype(np.int32)
FLOAT32: Final = np.dtype(np.float32)


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a layer's cache, [batch, *shape]."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes per row of the batch."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache; `dtype` is the type of activations."""

    kv_heads: int
    head_size: int
    value_size: int
    sinks: int
    window: int
    format: CacheFormat
    dtype: np.dtype[Any]
    eviction: Eviction = RING

    @property
    def operator(self) -> str:
        """The custom operator that reads and writes this cache."""
        return OPERATORS[self.eviction.policy] if self.eviction.enabled else self.format.operator

    def tensors(self) -> dict[str, CacheTensor]:
        """Return the tensors by name, in the order of the operator's inputs.

        Raises:
            RecipeError: the group does not divide the head, or elements do not fill bytes.

        """
        sizes = {"key": self.head_size, "value": self.value_size}
        sinks = max(self.sinks, 1)  # an operator's input cannot be empty
        found = {f"sink_{k}": CacheTensor(self.dtype, (self.kv_heads, sinks, sizes[k])) for k in KINDS}
        bits = self.format.bits
        if bits is None:
            slots = (self.kv_heads, self.window)
            found |= {f"window_{k}": CacheTensor(self.dtype, (*slots, sizes[k])) for k in KINDS}
            if self.eviction.enabled:
                found["window_position"] = CacheTensor(INT32, slots)
                found[f"window_{self.eviction.memory}"] = CacheTensor(FLOAT32, slots)
            return found
        for kind, size in sizes.items():
            if size * bits % 8:
                raise RecipeError(
                    f"kv_cache: heads of {size} {kind} channels do not fill bytes in int{bits}; use int8"
                )
            found[f"window_{kind}"] = CacheTensor(INT8, (self.kv_heads, self.window, size * bits // 8))
        for kind, size in sizes.items():
            group = group_size(self.format.group, size, "kv_cache.group", f"a {kind} head")
            shape = (self.kv_heads, self.window, size // group, 1 if self.format.fp8 else 2)
            found[f"window_{kind}_scale"] = CacheTensor(self.dtype, shape)
        if self.recent:
            for kind, size in sizes.items():
                found[f"recent_{kind}"] = CacheTensor(self.dtype, (self.kv_heads, self.recent, size))
        return found

    @property
    def recent(self) -> int:
        """Tokens kept in floating point; a window may be shorter than the format asks for."""
        return min(self.format.recent, self.window)

    @property
    def nbytes(self) -> int:
        """Bytes per row of the batch."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def graph_cache_bytes(graph: gs.Graph) -> int:
    """Return the bytes per row of all caches of a streaming graph: what a session allocates."""
    ports = [tensor for tensor in graph.inputs if tensor.name.startswith("cache.")]
    return sum(CacheTensor(np.dtype(port.dtype), tuple(port.shape[1:])).nbytes for port in ports)
