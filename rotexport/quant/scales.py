"""Scales of weights: round to nearest, and the search for the scale of least squared error.

A weight W [K, N] is quantized per output channel and group of input channels. With codes q and a scale s
shared by the elements w of one group, the squared error is least at s = <w, q> / <q, q>, where it is
|w|^2 - <w, q>^2 / <q, q>. The search therefore tries codes from a grid of clipped ranges, as QuaRot does
(arXiv 2404.00456, section 5), but scores each with its own best scale, so a coarse grid suffices.

With zero points the levels of a group reach from its least to its largest weight, zero included, so that
the zero point is a code. With c = q - z all of the above holds for c, which lies between bounds that are the
group's own: lowest - z and highest - z.

Scales in two levels are t[g, n] s[n] with whole factors t (QServe, arXiv 2405.04532, section 4.1), of which
none is so large that a code times it, c t, would leave int8: a product with integer activations needs one
integer accumulation, whatever the number of groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from rotexport.graph.weights import Array
from rotexport.quant.formats import INT4, NumberFormat

CHUNK_ELEMENTS: Final = 1 << 17  # of one column chunk: its few temporaries stay in a core's cache
# (smallest clipped range, number of ranges) to try: more levels gain less from clipping.
SEARCH_GRID: Final = {"int4": (0.5, 12), "int8": (0.8, 6), "fp8": (0.85, 4)}
SMALLEST_SCALE: Final = 2.0**-23  # stays above zero in fp16, also when a search halves it
LARGEST_INTEGER: Final = 127  # of a code times its factor


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """W[k, n] ~ codes[k, n] * scales[k // group, n], or codes * factors[k // group, n] * scales[0, n].

    `codes` [K, N] are in their storage type, `scales` [K / group, N] float32. In a two-level result `scales`
    is [1, N] and `factors` [K / group, N] holds integers, as float32. With `zeros` [K / group, N], of the
    codes' type, (codes - zeros) takes the codes' place.
    """

    codes: Array
    scales: Array
    factors: Array | None = None
    zeros: Array | None = None

    @property
    def offsets(self) -> Array | None:
        """What is added to codes, or in two levels to codes times factors, in place of zero points: int8."""
        if self.zeros is None:
            return None
        zeros = self.zeros.astype(np.float32)
        offsets: Array = -(zeros if self.factors is None else zeros * self.factors)
        return offsets.astype(np.int8)

    @property
    def factor_bytes(self) -> Array | None:
        """Factors in the low four bits of bytes, zero points in the high four: int8, for QuantizedLinear."""
        if self.factors is None:
            return None
        zeros = np.zeros_like(self.factors) if self.zeros is None else self.zeros.astype(np.float32)
        joined: Array = self.factors + 16 * zeros
        return joined.astype(np.int8)

    def columns(self, part: slice) -> QuantizedTensor:
        """Return some output channels."""
        factors, zeros = (None if v is None else v[:, part] for v in (self.factors, self.zeros))
        return QuantizedTensor(self.codes[:, part], self.scales[:, part], factors, zeros)


class WeightQuantizer(Protocol):
    """Turns a float matrix [K, N] into codes and scales; compared by value, so a frozen dataclass.

    A quantizer that needs more than the weight (the inputs' second moments, for GPTQ) holds it.
    """

    @property
    def format(self) -> NumberFormat:
        """Format of the codes."""

    @property
    def group(self) -> int:
        """Input channels that share a scale; divides K."""

    def quantize(self, weight: Array) -> QuantizedTensor:
        """Quantize a float32 or float64 matrix [K, N]."""


@dataclass(frozen=True)
class _Rounding(ABC):
    """Round to nearest on the levels of each group; in two levels, on those that whole factors leave."""

    format: NumberFormat
    group: int
    search: bool
    two_level: bool = False

    @abstractmethod
    def _levels(self, groups: Array, ratios: Array | None) -> tuple[Array, Array | None]:
        """Return scales [n, G] of groups [n, G, g], and their zero points where there are any."""

    def quantize(self, weight: Array, ratios: Array | None = None) -> QuantizedTensor:
        """Quantize a float matrix [K, N]; `ratios` [K / group, N] of the ranges replace the search."""
        inputs, outputs = weight.shape
        shape = (inputs // self.group, outputs)
        codes = np.empty((inputs, outputs), np.int8 if self.format.storage == INT4 else self.format.storage)
        scales = np.empty((1, outputs) if self.two_level else shape, np.float32)
        factors = np.empty(shape, np.float32) if self.two_level else None
        zeros: Array | None = None
        for columns, groups in _chunks(weight, self.group):
            scale, zero = self._levels(groups, None if ratios is None else ratios[:, columns].T)
            scale = scale.astype(np.float32)  # codes are made with the scale that is stored, not a finer one
            if factors is not None:
                centre = np.zeros_like(scale) if zero is None else zero
                factor, channel = _two_levels(groups, scale, centre, self.format)
                scale = channel * factor
                factors[:, columns], scales[:, columns] = factor.T, channel.T
            else:
                scales[:, columns] = scale.T
            steps = groups / scale[..., None]
            if zero is None:
                rounded = self.format.round(steps)
            else:
                rounded = round_centered(steps, zero[..., None], self.format) + zero[..., None]
                zeros = np.empty(shape, codes.dtype) if zeros is None else zeros
                zeros[:, columns] = zero.T
            codes[:, columns] = rounded.reshape(len(rounded), inputs).T
        stored = self.format.storage
        kept = None if zeros is None else zeros.astype(stored, copy=False)
        return QuantizedTensor(codes.astype(stored, copy=False), scales, factors, kept)


@dataclass(frozen=True)
class ScaledRounding(_Rounding):
    """The scale of a group comes from its largest magnitude, or from a search."""

    def _levels(self, groups: Array, ratios: Array | None) -> tuple[Array, Array | None]:
        if ratios is not None:
            return max_scale(groups, self.format) * ratios, None
        return _searched_scale(groups, self.format) if self.search else max_scale(groups, self.format), None


@dataclass(frozen=True)
class AsymmetricRounding(_Rounding):
    """Levels lie between a group's least and largest weight, or between searched ends."""

    def _levels(self, groups: Array, ratios: Array | None) -> tuple[Array, Array | None]:
        scale, zero = spanning_levels(groups, self.format, 1.0)
        if ratios is not None:  # clipped at both ends alike, a range keeps its zero point
            return scale * ratios, zero
        if not self.search:
            return scale, zero
        best_gain, best, widest = np.zeros_like(scale), np.ones_like(scale), scale
        units = groups / widest[..., None]  # so that nothing below depends on the weight's magnitude
        for clip in np.linspace(1.0, *SEARCH_GRID[self.format.name], dtype=groups.dtype):
            tried, shifted = spanning_levels(units, self.format, clip)
            codes = round_centered(units / tried[..., None], shifted[..., None], self.format)
            along, power = _dot(units, codes), np.maximum(_dot(codes, codes), 1)
            gain = along * along / power
            better = gain > best_gain
            best, zero = np.where(better, along / power, best), np.where(better, shifted, zero)
            best_gain = np.where(better, gain, best_gain)
        return widest * best, zero


def spanning_levels(groups: Array, number_format: NumberFormat, clip: float) -> tuple[Array, Array]:
    """Return scales and zero points [...] whose levels span `clip` times the range of groups [..., g].

    The range includes zero. Zero points are whole numbers in the type of `groups`.
    """
    least = np.minimum(groups.min(axis=-1), 0) * np.asarray(clip, groups.dtype)
    most = np.maximum(groups.max(axis=-1), 0) * np.asarray(clip, groups.dtype)
    scale = (most - least) / np.asarray(number_format.highest - number_format.lowest, groups.dtype)
    scale = np.where(scale > SMALLEST_SCALE, scale, np.ones_like(scale))
    zero = np.clip(np.rint(number_format.lowest - least / scale), number_format.lowest, number_format.highest)
    return scale, zero.astype(groups.dtype)


def round_centered(steps: Array, zero: Array, number_format: NumberFormat) -> Array:
    """Return the nearest codes, less their zero points, for values in units of their scale."""
    centered: Array = np.clip(np.rint(steps), number_format.lowest - zero, number_format.highest - zero)
    return centered


def max_scale(groups: Array, number_format: NumberFormat) -> Array:
    """Return the scales [...] that map the largest magnitude of groups [..., g] onto the highest code."""
    largest = np.abs(groups).max(axis=-1)
    scale: Array = largest / np.asarray(number_format.highest, groups.dtype)
    # Where the scale would vanish every code is zero, whatever the scale; runtimes refuse a scale of zero.
    return np.where(scale > SMALLEST_SCALE, scale, np.ones_like(scale))


def _searched_scale(groups: Array, number_format: NumberFormat) -> Array:
    widest = max_scale(groups, number_format)
    units = groups / widest[..., None]  # so that nothing below depends on the weight's magnitude
    best_gain = np.zeros_like(widest)
    best = np.ones_like(widest)
    for clip in np.linspace(1.0, *SEARCH_GRID[number_format.name], dtype=groups.dtype):
        codes = number_format.round(units / clip)
        along, power = _dot(units, codes), np.maximum(_dot(codes, codes), 1)  # 0 only if all codes are zero
        gain = along * along / power
        better = gain > best_gain
        best = np.where(better, along / power, best)
        best_gain = np.where(better, gain, best_gain)
    return widest * best


def _two_levels(groups: Array, scale: Array, zero: Array, number_format: NumberFormat) -> tuple[Array, Array]:
    """Return whole factors [n, G], and channels' scales [n, 1], in place of scales with zero points [n, G].

    The scale of a channel is that of least squared error for the codes that the rounded factors give.
    """
    largest = largest_factor(zero, number_format)
    first = (scale / largest).max(axis=-1, keepdims=True)
    factor: Array = np.clip(np.rint(scale / first), 1, largest)
    codes = round_centered(groups / (first * factor)[..., None], zero[..., None], number_format)
    integers = codes * factor[..., None]
    along = _dot(groups, integers).sum(axis=-1, keepdims=True)
    power = _dot(integers, integers).sum(axis=-1, keepdims=True)
    channel: Array = np.where(along > 0, along / np.maximum(power, 1), first)
    return factor, channel.astype(np.float32)


def largest_factor(zero: Array, number_format: NumberFormat) -> Array:
    """Return the largest factors with which no code, counted from its zero point, leaves int8."""
    farthest = np.maximum(zero - number_format.lowest, number_format.highest - zero)
    largest: Array = np.maximum(LARGEST_INTEGER // farthest, 1)
    return largest


def _dot(left: Array, right: Array) -> Array:
    result: Array = np.einsum("...k,...k->...", left, right)
    return result


def _chunks(weight: Array, group: int) -> Iterator[tuple[slice, Array]]:
    """Yield column slices and their groups [columns, K / group, group], contiguous along K."""
    inputs, outputs = weight.shape
    step = max(1, CHUNK_ELEMENTS // inputs)
    for start in range(0, outputs, step):
        columns = slice(start, min(start + step, outputs))
        block = np.ascontiguousarray(weight[:, columns].T)
        yield columns, block.reshape(len(block), inputs // group, group)
