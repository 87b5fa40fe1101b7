"""Weights rounded within learned clips: of every group's range, what a file says is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rotexport.errors import GraphError
from rotexport.graph.weights import Array
from rotexport.quant.formats import NumberFormat
from rotexport.quant.scales import AsymmetricRounding, QuantizedTensor, ScaledRounding


@dataclass(frozen=True)
class ClippedRounding:
    """A `WeightQuantizer` that takes `site`'s ratios of ranges from a file of `save_clips`."""

    rounding: ScaledRounding | AsymmetricRounding
    path: Path
    site: str

    @property
    def format(self) -> NumberFormat:
        """Format of the codes."""
        return self.rounding.format

    @property
    def group(self) -> int:
        """Input channels that share a scale."""
        return self.rounding.group

    def quantize(self, weight: Array) -> QuantizedTensor:
        """Quantize a float matrix [K, N].

        Raises:
            GraphError: the clips are those of another matrix.

        """
        with np.load(self.path) as arrays:
            ratios = arrays[self.site]
        expected = (len(weight) // self.group, weight.shape[1])
        if ratios.shape != expected:
            raise GraphError(f"site {self.site}: '{self.path}' holds clips {ratios.shape}, not {expected}")
        return self.rounding.quantize(weight, ratios)


def save_clips(path: Path, ratios: Mapping[str, Array]) -> None:
    """Write ratios [K / group, N] by site; the file appears whole or not at all."""
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **ratios)
    partial.rename(path)
