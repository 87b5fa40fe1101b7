"""Number formats: which values a code can take, and how real numbers are rounded onto them.

Most grids are symmetric, x ~ code * scale, and a scale maps the largest magnitude onto `highest`: TensorRT
runs nothing else (non-zero zero points are parse errors there). Elsewhere weights may have zero points,
x ~ (code - zero) * scale, and then use every code of their type. The key/value cache, which no integer
product reads, has minima instead: see `rotexport.passes.quantize_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np

from rotexport.errors import RecipeError
from rotexport.graph.weights import Array

FP8: Final = np.dtype(ml_dtypes.float8_e4m3fn)
INT4: Final = np.dtype(ml_dtypes.int4)
INT8: Final = np.dtype(np.int8)


@dataclass(frozen=True)
class NumberFormat:
    """The codes of one format: `lowest` to `highest`, kept in elements of type `storage`."""

    name: str
    storage: np.dtype[Any]
    lowest: float
    highest: float

    def round(self, values: Array) -> Array:
        """Return the nearest codes, ties to even, saturating, in a new array of the type of `values`."""
        codes: Array = np.maximum(values, np.asarray(self.lowest, values.dtype))
        np.minimum(codes, np.asarray(self.highest, values.dtype), out=codes)
        if self.storage == FP8:
            return codes.astype(FP8).astype(values.dtype)
        np.rint(codes, out=codes)
        return codes

    def fake_quantize(self, values: Array, scale: Array | float) -> Array:
        """Return `values` as they come back from quantization: round(values / scale) * scale."""
        result: Array = self.round(values / scale) * scale
        return result


WEIGHT_FORMATS: Final = {
    "int8": NumberFormat("int8", INT8, -127, 127),
    # The scale comes from max / 7 and -8 stays usable (QuaRot's quantizer): a clipped negative tail gets one
    # more level for free. The grid x = code * scale is still symmetric, so every runtime accepts it.
    "int4": NumberFormat("int4", INT4, -8, 7),
    "fp8": NumberFormat("fp8", FP8, -448, 448),
}

# With zero points there is no reason to leave a code out.
ASYMMETRIC_WEIGHT_FORMATS: Final = {
    "int8": NumberFormat("int8", INT8, -128, 127),
    "int4": NumberFormat("int4", INT4, -8, 7),
}

ACTIVATION_FORMATS: Final = {
    # QuantizeLinear saturates at -128, which only values beyond a clip reach.
    "int8": NumberFormat("int8", INT8, -128, 127),
    # Kept in int8: no runtime multiplies 4-bit by 4-bit, so the grid is clipped explicitly, symmetrically.
    "int4": NumberFormat("int4", INT8, -7, 7),
    "fp8": NumberFormat("fp8", FP8, -448, 448),
}
# Counted from a token's own lowest level, which is 0 to 15 steps below zero: within int8.
OFFSET_ACTIVATIONS: Final = NumberFormat("int4", INT8, -15, 15)
OFFSET_LEVELS: Final = 16


def weight_format(name: str, symmetric: bool = True) -> NumberFormat:
    """Return the format of weights called `name`, without or with zero points."""
    return _named(name, WEIGHT_FORMATS if symmetric else ASYMMETRIC_WEIGHT_FORMATS)


def activation_format(name: str, symmetric: bool = True) -> NumberFormat:
    """Return the format of activations called `name`; without `symmetric`, of 4-bit ones alone."""
    return _named(name, ACTIVATION_FORMATS if symmetric else {"int4": OFFSET_ACTIVATIONS})


def _named(name: str, formats: dict[str, NumberFormat]) -> NumberFormat:
    if name not in formats:
        raise RecipeError(f"there is no number format '{name}'; choose one of {', '.join(formats)}")
    return formats[name]
