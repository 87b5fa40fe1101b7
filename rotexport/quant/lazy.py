"""Quantized weights as lazy tensors: codes and scales share one computation, made when they are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from rotexport.errors import GraphError
from rotexport.graph.weights import Array, Weight
from rotexport.quant.scales import QuantizedTensor, WeightQuantizer


class Part(Enum):
    """Which tensor of a quantized weight."""

    CODES = "codes"
    SCALES = "scales"
    FACTORS = "factors"
    ZEROS = "zeros"
    OFFSETS = "offsets"
    FACTOR_BYTES = "factor_bytes"


class Memo:
    """Remembers one result, the last, so that memory does not grow with the number of weights."""

    def __init__(self) -> None:
        self._key: Quantization | None = None
        self._value: QuantizedTensor | None = None

    def result(self, quantization: Quantization) -> QuantizedTensor:
        """Return the quantized tensor, computing it unless it was the last one asked for."""
        if self._value is None or self._key != quantization:
            self._key = self._value = None  # the old tensor goes before the new one comes
            weight = quantization.source.read().astype(np.float32, copy=False)
            self._value = quantization.quantizer.quantize(weight)
            self._key = quantization
        return self._value


@dataclass(frozen=True)
class Quantization:
    """A float weight [K, N] and how it is quantized."""

    source: Weight
    quantizer: WeightQuantizer
    memo: Memo = field(compare=False, repr=False)

    @property
    def groups(self) -> int:
        """Groups of input channels."""
        return self.source.shape[0] // self.quantizer.group


@dataclass(frozen=True)
class QuantizedPart(Weight):
    """One tensor of a quantized weight, row-major in shape `viewed`."""

    quantization: Quantization
    part: Part
    viewed: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.viewed

    @property
    def dtype(self) -> np.dtype[Any]:
        if self.part in (Part.CODES, Part.ZEROS):
            return self.quantization.quantizer.format.storage
        if self.part in (Part.OFFSETS, Part.FACTOR_BYTES):
            return np.dtype(np.int8)
        return np.dtype(np.float32)

    def read(self) -> Array:
        result = self.quantization.memo.result(self.quantization)
        values: Array | None = getattr(result, self.part.value)
        if values is None:
            raise GraphError(f"{self.quantization.quantizer} makes no {self.part.value}")
        return values.reshape(self.viewed)
