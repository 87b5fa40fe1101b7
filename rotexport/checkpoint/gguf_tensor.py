"""Tensors of a GGUF file as lazy weights: dequantized by rows or columns, llama.cpp's layouts undone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from rotexport.graph.weights import Array, OfOne, Weight, whole


@dataclass(frozen=True)
class GgufTensor(Weight):
    """Blocks of `kind` in a file, read as float32; the last axis is cut into blocks.

    `offset` is in bytes, `stored_shape` in elements, slowest axis first.
    """

    path: Path
    offset: int
    kind: GGMLQuantizationType
    stored_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    @property
    def block_length(self) -> int:
        """Elements in a block."""
        return int(GGML_QUANT_SIZES[self.kind][0])

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        length, size = GGML_QUANT_SIZES[self.kind]
        count = 1
        for extent in self.stored_shape:
            count *= extent
        return count // int(length) * int(size)

    def read(self) -> Array:
        return self._values(self._blocks())

    def slab(self, axis: int, start: int, stop: int) -> Array:
        axis %= len(self.shape)
        if axis != len(self.shape) - 1:
            index = [slice(None)] * axis + [slice(start, stop)]
            return self._values(self._blocks()[tuple(index)])
        first, last = start // self.block_length, -(-stop // self.block_length)
        values = self._values(self._blocks()[..., first:last, :])
        return values[..., start - first * self.block_length : stop - first * self.block_length]

    def _blocks(self) -> Array:
        """Map the file: bytes [..., blocks in a row, bytes in a block]."""
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (self.stored_bytes,))
        blocks = self.stored_shape[-1] // self.block_length
        return raw.reshape(*self.stored_shape[:-1], blocks, int(GGML_QUANT_SIZES[self.kind][1]))

    def _values(self, blocks: Array) -> Array:
        rows = np.array(blocks, order="C", subok=False).reshape(*blocks.shape[:-2], -1)
        values: Array = dequantize(rows, self.kind).astype(np.float32, copy=False)
        return values


@dataclass(frozen=True)
class HalvesRestored(OfOne):
    """Query or key rows as transformers orders them, from llama.cpp's order.

    transformers rotates component i of a head with component i + d/2 ("halves"); llama.cpp stores the two
    next to each other, 2i and 2i + 1. Row `h d + j d/2 + i` here is row `h d + 2 i + j` there, for head h,
    half j, and i < d/2. Works on biases too.
    """

    heads: int

    def slab(self, axis: int, start: int, stop: int) -> Array:
        if axis != 0:
            return self._restore(self.weight.slab(axis, start, stop))
        width = self.shape[0] // self.heads
        first, last = start // width, -(-stop // width)
        heads = self._restore(self.weight.slab(0, first * width, last * width))
        return heads[start - first * width : stop - first * width]

    def _whole(self) -> Array:
        return self._restore(whole(self.weight))

    def _restore(self, rows: Array) -> Array:
        width = self.shape[0] // self.heads
        pairs = rows.reshape(-1, width // 2, 2, *rows.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
