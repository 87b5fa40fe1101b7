"""Quantizers as functions of tensors: what the quantized graph computes in front of a product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotexport.passes.quantize_activations import SMALLEST_SCALE as SMALLEST_ACTIVATION_SCALE
from rotexport.passes.quantize_cache import BITS
from rotexport.passes.quantize_cache import SMALLEST_SCALE as SMALLEST_CACHE_SCALE
from rotexport.quant.formats import FP8, OFFSET_ACTIVATIONS, OFFSET_LEVELS, NumberFormat


@dataclass(frozen=True)
class StaticQuantizer:
    """Rounds to multiples of `step`."""

    format: NumberFormat
    step: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return what x [...] stands for after quantization."""
        return rounded(x / self.step, self.format) * self.step


@dataclass(frozen=True)
class DynamicQuantizer:
    """Rounds to multiples of a scale per token and `group` of channels: clip times the largest magnitude."""

    format: NumberFormat
    clip: float
    group: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return what x [..., K] stands for after quantization."""
        groups = x.unflatten(-1, (-1, self.group))
        scale, bounds = row_levels(groups, self.clip, self.format)
        if bounds is None:
            return (rounded(groups / scale, self.format) * scale).flatten(-2)
        return ((groups / scale).round().clamp(*bounds) * scale).flatten(-2)


@dataclass(frozen=True)
class CacheQuantizer:
    """Levels between a minimum and a maximum per token, head and `group`, as `QuantizeCache` stores them."""

    format: str
    group: int
    clip: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return what x [batch, heads, tokens, head size] stands for after quantization."""
        levels = 2 ** BITS[self.format] - 1
        groups = x.unflatten(-1, (-1, self.group))
        lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        span = highest - lowest
        lowest = lowest + span * ((1 - self.clip) / 2)
        scale = (span * (self.clip / levels)).clamp_min(SMALLEST_CACHE_SCALE)
        codes = ((groups - lowest) / scale).round().clamp(0, levels)
        return (codes * scale + lowest).flatten(-2)


def row_levels(
    rows: Tensor, clip: Tensor | float, number_format: NumberFormat
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return scales [..., 1] of rows [..., g], and the lowest and highest code where each row has its own."""
    if number_format != OFFSET_ACTIVATIONS:
        scale = rows.abs().amax(-1, keepdim=True) * (clip / number_format.highest)
        return scale.clamp_min(SMALLEST_ACTIVATION_SCALE), None
    least, most = rows.amin(-1, keepdim=True).clamp_max(0), rows.amax(-1, keepdim=True).clamp_min(0)
    scale = ((most - least) * (clip / (OFFSET_LEVELS - 1))).clamp_min(SMALLEST_ACTIVATION_SCALE)
    lowest = (least * clip / scale).detach().round()
    return scale, (lowest, lowest + (OFFSET_LEVELS - 1))


def rounded(x: Tensor, number_format: NumberFormat) -> Tensor:
    """Return the nearest codes, ties to even, saturating."""
    codes = x.clamp(number_format.lowest, number_format.highest)
    if number_format.storage == FP8:
        return codes.to(torch.float8_e4m3fn).to(x.dtype)
    return codes.round()
