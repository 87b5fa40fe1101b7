"""The values a quantized weight can take: codes times scales, the scales fitted group by group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import numpy as np

from rotexport.graph.weights import Array
from rotexport.quant.formats import INT4, NumberFormat
from rotexport.quant.scales import (
    SEARCH_GRID,
    SMALLEST_SCALE,
    AsymmetricRounding,
    QuantizedTensor,
    ScaledRounding,
    largest_factor,
    max_scale,
    round_centered,
    spanning_levels,
)

FINENESS: Final = 2  # as many clipped ranges per group as a search without importance tries
FACTORS: Final = 7  # of a group that a search tries beside its zero points
LARGEST_CHANGE: Final = 2.0  # of a refitted scale: beyond it the least squares are ill-conditioned


class Grid(ABC):
    """Scales of a weight [K, N] in groups of input channels, found one group at a time.

    Codes are counted from the zero point, where there is one. `importance` [g] weights the squared errors
    of a group's rows when its scale is fitted.
    """

    def __init__(self, number_format: NumberFormat, group: int) -> None:
        self.format = number_format
        self.group = group

    @abstractmethod
    def fit(self, index: int, rows: Array, importance: Array) -> None:
        """Choose the scales of group `index` for its rows [g, N]."""

    @abstractmethod
    def scales(self, index: int) -> Array:
        """Return the scales [N] of a group."""

    @abstractmethod
    def refit(self, codes: Array, hessian: Array, target: Array) -> None:
        """Lower the loss by scales alone: codes [K, N] stay, `target` is H W [K, N]."""

    @abstractmethod
    def finish(self, codes: Array) -> QuantizedTensor:
        """Return codes [K, N] with the scales, in their storage types."""

    def rounded(self, steps: Array, index: int) -> Array:
        """Return the codes nearest to rows [..., N] of a group, given in units of their scales."""
        return self.format.round(steps)

    def fit_all(self, weight: Array, importance: Array) -> None:
        """Choose all scales for a weight [K, N]."""
        for index in range(len(weight) // self.group):
            rows = slice(index * self.group, (index + 1) * self.group)
            self.fit(index, weight[rows], importance[rows])

    def expanded(self, inputs: int) -> Array:
        """Return the scale of every element, [K, N]."""
        scales = np.stack([self.scales(index) for index in range(inputs // self.group)])
        return np.repeat(scales, self.group, axis=0)

    def stored(self, codes: Array) -> Array:
        """Return codes in their storage type."""
        narrow: Array = codes.astype(np.int8) if self.format.storage == INT4 else codes
        return narrow.astype(self.format.storage, copy=False)


class FreeScales(Grid):
    """A float32 scale per group and output channel."""

    def __init__(self, number_format: NumberFormat, weight: Array, group: int) -> None:
        super().__init__(number_format, group)
        self._scales = np.ones((len(weight) // group, weight.shape[1]), np.float32)

    def fit(self, index: int, rows: Array, importance: Array) -> None:
        widest = max_scale(rows.T, self.format)
        lowest, count = SEARCH_GRID[self.format.name]
        clips = np.linspace(1.0, lowest, FINENESS * count, dtype=rows.dtype)
        candidates = widest * clips[:, None]
        self._scales[index] = _best(rows, importance, candidates, self.format)

    def scales(self, index: int) -> Array:
        scales: Array = self._scales[index]
        return scales

    def refit(self, codes: Array, hessian: Array, target: Array) -> None:
        groups = len(self._scales)
        grouped = codes.reshape(groups, self.group, -1)
        along = np.einsum("gkn,gkn->ng", grouped, target.reshape(grouped.shape))
        power = np.empty((codes.shape[1], groups, groups), codes.dtype)
        for index in range(groups):
            rows = slice(index * self.group, (index + 1) * self.group)
            pushed = (hessian[:, rows] @ codes[rows]).reshape(grouped.shape)
            power[:, :, index] = np.einsum("gkn,gkn->ng", grouped, pushed)
        unused = np.einsum("nii->ni", power) <= 0
        power[:, np.arange(groups), np.arange(groups)] += unused
        solved = np.linalg.solve(power.astype(np.float64), along[..., None].astype(np.float64))[..., 0].T
        ratio = solved / self._scales
        usable = (ratio < LARGEST_CHANGE) & (ratio > 1 / LARGEST_CHANGE) & (solved > SMALLEST_SCALE)
        whole = usable.all(axis=0)  # scales of a channel are the best together, not one by one
        self._scales[:, whole] = solved[:, whole]

    def finish(self, codes: Array) -> QuantizedTensor:
        return QuantizedTensor(self.stored(codes), self._scales)


class _ZeroPoints(Grid):
    """What grids with a zero point per group and output channel share."""

    _zeros: Array

    def rounded(self, steps: Array, index: int) -> Array:
        return round_centered(steps, self._zeros[index], self.format)

    def _shifted(self, codes: Array, scales: Array, factors: Array | None = None) -> QuantizedTensor:
        """Return codes [K, N], counted from zero points, as they are stored."""
        shifted = codes + np.repeat(self._zeros, self.group, axis=0)
        return QuantizedTensor(self.stored(shifted), scales, factors, self.stored(self._zeros))


class AsymmetricScales(_ZeroPoints, FreeScales):
    """A float32 scale and a zero point per group and output channel."""

    def __init__(self, number_format: NumberFormat, weight: Array, group: int) -> None:
        super().__init__(number_format, weight, group)
        self._zeros = np.zeros_like(self._scales)

    def fit(self, index: int, rows: Array, importance: Array) -> None:
        lowest, count = SEARCH_GRID[self.format.name]
        least = np.full(rows.shape[1], np.inf, rows.dtype)
        for clip in np.linspace(1.0, lowest, FINENESS * count, dtype=rows.dtype):
            scale, zero = spanning_levels(rows.T, self.format, clip)
            error = round_centered(rows / scale, zero, self.format) * scale - rows
            total = importance @ np.square(error)
            better = total < least
            least = np.where(better, total, least)
            self._scales[index] = np.where(better, scale, self._scales[index])
            self._zeros[index] = np.where(better, zero, self._zeros[index])

    def finish(self, codes: Array) -> QuantizedTensor:
        return self._shifted(codes, self._scales)


class IntegerFactors(Grid):
    """A scale t[g, n] s[n] with whole t of at most 15, and so one integer product for all groups."""

    def __init__(self, number_format: NumberFormat, weight: Array, group: int) -> None:
        super().__init__(number_format, group)
        start = self._start(weight)
        assert start.factors is not None
        self._channel, self._factors = start.scales[0], start.factors

    def _start(self, weight: Array) -> QuantizedTensor:
        return ScaledRounding(self.format, self.group, search=True, two_level=True).quantize(weight)

    def fit(self, index: int, rows: Array, importance: Array) -> None:
        most = int(largest_factor(np.zeros(1, rows.dtype), self.format)[0])
        candidates = np.arange(1, most + 1, dtype=rows.dtype)[:, None] * self._channel
        self._factors[index] = _best(rows, importance, candidates, self.format) / self._channel
        np.rint(self._factors[index], out=self._factors[index])

    def scales(self, index: int) -> Array:
        scales: Array = self._factors[index] * self._channel
        return scales

    def refit(self, codes: Array, hessian: Array, target: Array) -> None:
        values = codes * np.repeat(self._factors, self.group, axis=0)
        along = np.einsum("kn,kn->n", values, target)
        power = np.einsum("kn,kn->n", values, hessian @ values)
        usable = (along > 0) & (power > 0)
        self._channel = np.where(usable, along / np.where(usable, power, 1), self._channel).astype(np.float32)

    def finish(self, codes: Array) -> QuantizedTensor:
        return QuantizedTensor(self.stored(codes), self._channel[None], self._factors)


class AsymmetricFactors(_ZeroPoints, IntegerFactors):
    """A scale t[g, n] s[n] and a zero point per group, t so small that no code times t leaves int8."""

    def _start(self, weight: Array) -> QuantizedTensor:
        start = AsymmetricRounding(self.format, self.group, search=True, two_level=True).quantize(weight)
        assert start.zeros is not None
        self._zeros = start.zeros.astype(weight.dtype)
        return start

    def fit(self, index: int, rows: Array, importance: Array) -> None:
        lowest, highest = self.format.lowest, self.format.highest
        bottom, top = np.minimum(rows.min(axis=0), 0), np.maximum(rows.max(axis=0), 0)
        whole = np.ceil((top - bottom) / ((highest - lowest) * self._channel))  # holds every row unclipped
        least = np.full(rows.shape[1], np.inf, rows.dtype)
        clips = np.linspace(1.0, SEARCH_GRID[self.format.name][0], FACTORS, dtype=rows.dtype)
        for clip in clips:
            factor = np.maximum(np.rint(whole * clip), 1)
            scale = factor * self._channel
            # The levels' middle lies at the middle of the range, which is clipped at both ends alike.
            middle = (lowest + highest) / 2 - (bottom + top) / (2 * scale)
            for zero in (np.floor(middle), np.ceil(middle)):
                bounded = np.clip(zero, lowest, highest)
                error = round_centered(rows / scale, bounded, self.format) * scale - rows
                total = importance @ np.square(error)
                better = (total < least) & (factor <= largest_factor(bounded, self.format))
                least = np.where(better, total, least)
                self._factors[index] = np.where(better, factor, self._factors[index])
                self._zeros[index] = np.where(better, bounded, self._zeros[index])

    def finish(self, codes: Array) -> QuantizedTensor:
        return self._shifted(codes, self._channel[None], self._factors)


def _best(rows: Array, importance: Array, candidates: Array, number_format: NumberFormat) -> Array:
    """Return, of candidate scales [C, N], those with the least weighted squared error on rows [g, N]."""
    least = np.full(rows.shape[1], np.inf, rows.dtype)
    best: Array = candidates[0].copy()
    for scale in candidates:
        error = number_format.fake_quantize(rows, scale) - rows
        total = importance @ np.square(error)
        better = total < least
        best, least = np.where(better, scale, best), np.where(better, total, least)
    return best
