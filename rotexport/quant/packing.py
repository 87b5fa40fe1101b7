"""Weights as the QuantizedLinear operators read them: a padded row for each output, 4-bit codes in pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rotexport.errors import GraphError
from rotexport.graph.weights import Array, Weight
from rotexport.quant.lazy import Part, Quantization, QuantizedPart

INT8 = np.dtype(np.int8)


def pack_rows(codes: Array, bits: int, length: int) -> Array:
    """Return codes [K, N] as int8 rows [N, length * bits / 8], zeros beyond K.

    4-bit codes are in two's complement, two to a byte, that of even k in the low nibble.

    Raises:
        GraphError: `length` is shorter than K, or does not fill its last byte.

    """
    inputs, outputs = codes.shape
    if length < inputs or length * bits % 8:
        raise GraphError(f"{inputs} codes of {bits} bits do not fit rows of {length}")
    rows = np.zeros((outputs, length), np.int8)
    rows[:, :inputs] = codes.T
    if bits == 8:
        return rows
    packed: Array = ((rows[:, 0::2] & 15) | (rows[:, 1::2] << 4)).astype(np.int8)
    return packed


def unpack_rows(rows: Array, bits: int, inputs: int) -> Array:
    """Return the codes int8 [inputs, N] of packed rows."""
    if bits == 8:
        return rows[:, :inputs].T
    pairs = np.stack([(rows << 4).astype(np.int8) >> 4, rows >> 4], axis=-1)
    return pairs.reshape(len(rows), -1)[:, :inputs].T


@dataclass(frozen=True)
class PackedRows(Weight):
    """The codes of a quantized weight [K, N], packed when they are read."""

    quantization: Quantization
    bits: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.quantization.source.shape[1], self.length * self.bits // 8

    @property
    def dtype(self) -> np.dtype[Any]:
        return INT8

    def read(self) -> Array:
        codes = QuantizedPart(self.quantization, Part.CODES, self.quantization.source.shape).read()
        return pack_rows(codes.astype(np.int8), self.bits, self.length)
