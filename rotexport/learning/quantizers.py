"""What stands in a block for its quantizers while they are learned: of weights, activations, and the cache.

Their forward values are those of the exported graph: weights bit for bit, since codes, factors and scales
are made here once and multiplied in the order in which DequantizeLinear does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rotexport.blocks.fake_quant import row_levels
from rotexport.learning.lsq import lsq_gradient_factor, narrowed, round_clip, scale_gradient
from rotexport.quant.formats import INT4, NumberFormat, activation_format
from rotexport.quant.scales import QuantizedTensor, largest_factor
from rotexport.quant.scheme import ActivationScheme

KEPT_OFFSET = 0.25  # of a step: nearer its code's ends, a number would leave the code at the first noise
MOST_CERTAIN_CLIP = 0.982  # sigmoid(4): where a clip of 1 begins, so that it has a gradient (OmniQuant)


@dataclass(frozen=True)
class WeightGrid:
    """Where the codes of a weight lie: their format, the group, and the float type that keeps the scales."""

    format: NumberFormat
    group: int
    scale_type: torch.dtype = torch.float32


class LearnedWeight(nn.Module):  # type: ignore[misc]  # torch is Any here
    """A quantized weight [K, N] whose numbers, scales and (two-level) factors have gradients.

    The trained number of an element is counted in units of its group's first scale, so that one learning
    rate, in steps of the grid, fits every group of every model. Scales are trained by their logarithms.
    Zero points stay; numbers and codes in here are counted from them.
    """

    first_scale: Tensor
    first_channel: Tensor
    first_factor: Tensor | None
    zeros: Tensor | None

    def __init__(self, weight: Tensor, start: QuantizedTensor, grid: WeightGrid) -> None:
        """Start from the codes of `start`, each as near to `weight` [K, N] as its code allows."""
        super().__init__()
        self.grid = grid
        inputs, outputs = weight.shape
        groups = inputs // grid.group
        channel = torch.from_numpy(np.asarray(start.scales, np.float32)).reshape(-1, 1, outputs)
        self.register_buffer("first_channel", channel)
        factor = None
        if start.factors is not None:
            factor = _grouped(start.factors, groups)
        self.register_buffer("first_factor", factor)
        self.register_buffer("first_scale", channel if factor is None else channel * factor)
        self.register_buffer("zeros", None if start.zeros is None else _grouped(start.zeros, groups))
        zeros = np.zeros((1, 1, 1), np.float32) if self.zeros is None else self.zeros.numpy()
        self._largest_factor = torch.from_numpy(largest_factor(zeros, grid.format))
        self.channel = nn.Parameter(torch.zeros_like(channel))
        self.factor = None if factor is None else nn.Parameter(torch.zeros_like(factor))
        self.numbers = nn.Parameter(self._nearest(weight, start))

    def _nearest(self, weight: Tensor, start: QuantizedTensor) -> Tensor:
        """Return numbers [G, g, N] that round to the codes of `start`."""
        groups = (-1, self.grid.group, weight.shape[1])
        codes = torch.from_numpy(np.asarray(start.codes, np.float32)).reshape(groups)
        codes = codes if self.zeros is None else codes - self.zeros
        offsets = (weight.reshape(groups) / self.first_scale - codes).clamp_(-KEPT_OFFSET, KEPT_OFFSET)
        return (codes + offsets).clamp_(*self._bounds())

    def _bounds(self) -> tuple[Any, Any]:
        """Return the lowest and the highest code: numbers, or [G, 1, N] with zero points."""
        number_format = self.grid.format
        if self.zeros is None:
            return number_format.lowest, number_format.highest
        return number_format.lowest - self.zeros, number_format.highest - self.zeros

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """Return scales [1 or G, 1, N] and, in two levels, integer factors [G, 1, N]."""
        highest, count = self.grid.format.highest, self.grid.group
        balance = lsq_gradient_factor(count, highest)
        scale = self.first_channel * scale_gradient(self.channel, balance).exp()
        if self.grid.scale_type != torch.float32:
            scale = narrowed(scale, self.grid.scale_type)
        if self.factor is None or self.first_factor is None:
            return scale, None
        factor = self.first_factor * scale_gradient(self.factor, balance).exp()
        return scale, round_clip(factor, torch.ones_like(self._largest_factor), self._largest_factor)

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """Return the dequantized weight [K, N]; `weight` is what it replaces, and not read."""
        scale, factor = self.scales()
        codes = self._codes(scale if factor is None else scale * factor)
        values = codes * scale if factor is None else (codes * factor) * scale
        return values.reshape(-1, values.shape[-1])

    def _codes(self, scale: Tensor) -> Tensor:
        steps = self.numbers * (self.first_scale / scale)
        return round_clip(steps, *self._bounds())

    def project(self) -> None:
        """Bring numbers that left the range back to its ends: outside, no gradient would ever reach them."""
        with torch.no_grad():
            scale, factor = self.scales()
            ratio = (scale if factor is None else scale * factor) / self.first_scale
            lowest, highest = self._bounds()
            torch.clamp(self.numbers, lowest * ratio, highest * ratio, out=self.numbers)

    def export(self) -> QuantizedTensor:
        """Return the codes, scales and factors of the last forward pass."""
        with torch.no_grad():
            scale, factor = self.scales()
            codes = self._codes(scale if factor is None else scale * factor)
            codes = codes if self.zeros is None else codes + self.zeros
        outputs = codes.shape[-1]
        return QuantizedTensor(
            self._stored(codes),
            scale.reshape(-1, outputs).numpy(),
            None if factor is None else factor.reshape(-1, outputs).numpy(),
            None if self.zeros is None else self._stored(self.zeros),
        )

    def _stored(self, integers: Tensor) -> Any:
        """Return whole numbers [..., N] as the storage type keeps them, [.., N]."""
        storage = self.grid.format.storage
        narrow = np.dtype(np.int8) if storage == INT4 else storage
        rows = integers.reshape(-1, integers.shape[-1]).numpy()
        return rows.astype(narrow).astype(storage, copy=False)


def _grouped(values: Any, groups: int) -> Tensor:
    """Return an array [G, N] as float32 [G, 1, N]."""
    return torch.from_numpy(np.asarray(values, np.float32)).reshape(groups, 1, -1)


class ActivationQuantizer(nn.Module):  # type: ignore[misc]  # torch is Any here
    """Quantizes activations [..., K] per token, or per token and group; a learned clip has a gradient."""

    def __init__(self, scheme: ActivationScheme, group: int, learn_clip: bool) -> None:
        """Start from the scheme's clip; `group` channels share a scale."""
        super().__init__()
        self.format = activation_format(scheme.format, scheme.symmetric)
        self.group = group
        self._fixed = scheme.clip
        start = min(scheme.clip, MOST_CERTAIN_CLIP)
        self.logit = nn.Parameter(torch.tensor(math.log(start / (1 - start)))) if learn_clip else None

    @property
    def clip(self) -> Tensor | float:
        """The fraction of a row's largest magnitude that the highest code stands for."""
        return self._fixed if self.logit is None else self.logit.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return x as it comes back from quantization."""
        rows = x.reshape(*x.shape[:-1], -1, self.group)
        scale, bounds = row_levels(rows.detach(), self.clip, self.format)
        codes = round_clip(rows / scale, *(bounds or (self.format.lowest, self.format.highest)))
        return (codes * scale).reshape(x.shape)


class StraightThrough(nn.Module):  # type: ignore[misc]  # torch is Any here
    """A quantizer without anything to learn: its gradient is the identity's."""

    def __init__(self, quantizer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Return what x stands for after quantization."""
        kept = x.detach()
        return x + (self._quantizer(kept) - kept)
