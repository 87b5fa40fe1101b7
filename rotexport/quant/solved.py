"""Weights whose codes were chosen beforehand, block by block, and wait in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rotexport.errors import GraphError
from rotexport.graph.weights import Array
from rotexport.quant.formats import INT4, NumberFormat
from rotexport.quant.scales import QuantizedTensor


@dataclass(frozen=True)
class SolvedWeight:
    """A `WeightQuantizer` that returns the codes and scales kept for `site` in a file of `save_solved`."""

    path: Path
    site: str
    format: NumberFormat
    group: int

    def quantize(self, weight: Array) -> QuantizedTensor:
        """Return what was chosen; `weight` [K, N] is what it was chosen for.

        Raises:
            GraphError: the kept codes have another shape.

        """
        result = load_solved(self.path, self.site, self.format)
        if result.codes.shape != weight.shape:
            raise GraphError(
                f"site {self.site}: '{self.path}' holds codes {result.codes.shape}, not {weight.shape}"
            )
        return result


def save_solved(path: Path, tensors: Mapping[str, QuantizedTensor]) -> None:
    """Write the quantized weights of some sites; the file appears whole or not at all."""
    arrays: dict[str, Array] = {}
    for site, tensor in tensors.items():
        arrays[f"{site}.codes"] = _plain(tensor.codes)
        arrays[f"{site}.scales"] = tensor.scales
        if tensor.factors is not None:
            arrays[f"{site}.factors"] = tensor.factors
        if tensor.zeros is not None:
            arrays[f"{site}.zeros"] = _plain(tensor.zeros)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    partial.rename(path)


def load_solved(path: Path, site: str, number_format: NumberFormat) -> QuantizedTensor:
    """Read what `save_solved` wrote for one site."""
    with np.load(path) as arrays:
        kept = arrays[f"{site}.codes"]
        same_size = kept.dtype.itemsize == number_format.storage.itemsize and kept.dtype != np.int8
        codes = kept.view(number_format.storage) if same_size else kept.astype(number_format.storage)
        zeros = arrays.get(f"{site}.zeros")
        zeros = None if zeros is None else zeros.astype(number_format.storage)
        return QuantizedTensor(codes, arrays[f"{site}.scales"], arrays.get(f"{site}.factors"), zeros)


def _plain(codes: Array) -> Array:
    """Return codes in a type that NumPy's files know."""
    if codes.dtype == INT4:
        return codes.astype(np.int8)
    return codes if codes.dtype == np.int8 else codes.view(np.uint8)


def dequantized(tensor: QuantizedTensor) -> Array:
    """Return the float32 matrix [K, N] that codes and scales stand for: integers first, then one rounding."""
    values: Array = tensor.codes.astype(np.float32)
    if tensor.zeros is not None:
        values -= np.repeat(tensor.zeros.astype(np.float32), len(values) // len(tensor.zeros), axis=0)
    for multiplier in (tensor.factors, tensor.scales):
        if multiplier is not None:
            values = values * np.repeat(multiplier, len(values) // len(multiplier), axis=0)
    return values
