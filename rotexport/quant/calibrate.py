"""Activation statistics: what enters each linear, seen by running the float graph on real tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from rotexport.errors import RecipeError
from rotexport.graph.weights import Array
from rotexport.quant.formats import NumberFormat, activation_format
from rotexport.quant.scheme import ActivationScheme

Run: TypeAlias = Callable[[Sequence[Array], Sequence[str]], Iterable[dict[str, Array]]]
"""Runs the graph on each window of token ids [S] (int64) from an empty cache and yields, window by window,
the tensors asked for by name."""

# Magnitudes are counted by the upper half of their float32 pattern: bins 2^-7 wide, relative to the value.
BINS: Final = 0x7F80  # up to infinity
BIN_EDGES: Final = (np.arange(BINS + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
POINTS_PER_BIN: Final = 4  # where a bin is sampled when its rounding error is integrated
CANDIDATE_RANGES: Final = 64
NARROWEST_RANGE: Final = 1 / 64


@dataclass(frozen=True)
class Probe:
    """A tensor [..., channels] that one or more linear sites read."""

    tensor: str
    channels: int
    sites: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What was seen of one linear's input.

    `token_maxima` [tokens] and `channel_maxima` [channels] are largest magnitudes; `histogram` [BINS] counts
    magnitudes between `BIN_EDGES`; `kurtosis` is of all elements (3 for a normal distribution).
    """

    token_maxima: Array
    channel_maxima: Array
    kurtosis: float
    histogram: Array

    @property
    def maximum(self) -> float:
        """Largest magnitude."""
        return float(self.token_maxima.max())

    @property
    def token_ratio(self) -> float:
        """Largest token's maximum over the median token's: how uneven tokens are."""
        return _ratio(self.token_maxima)

    @property
    def channel_ratio(self) -> float:
        """Largest channel's maximum over the median channel's: what a rotation evens out."""
        return _ratio(self.channel_maxima)

    def percentile(self, percent: float) -> float:
        """Return the magnitude that `percent` of all elements do not exceed, to the end of its bin."""
        cumulative = np.cumsum(self.histogram)
        index = int(np.searchsorted(cumulative, cumulative[-1] * percent / 100))
        return min(self.maximum, float(BIN_EDGES[index + 1]))

    def least_error_range(self, number_format: NumberFormat) -> float:
        """Return the clipped range whose scale gives the least mean squared error, from the histogram."""
        used = np.flatnonzero(self.histogram)
        lower, upper = BIN_EDGES[used, None], BIN_EDGES[used + 1, None]
        offsets = (np.arange(POINTS_PER_BIN) + 0.5) / POINTS_PER_BIN
        points = (lower + (upper - lower) * offsets).ravel()
        weights = np.repeat(self.histogram[used] / POINTS_PER_BIN, POINTS_PER_BIN)
        ranges = np.geomspace(1.0, NARROWEST_RANGE, CANDIDATE_RANGES) * self.maximum
        rounded = (number_format.fake_quantize(points, limit / number_format.highest) for limit in ranges)
        errors = [np.dot(weights, (values - points) ** 2) for values in rounded]
        return float(ranges[int(np.argmin(errors))])

    def static_scale(self, scheme: ActivationScheme) -> float:
        """Return the per-tensor scale that a static scheme asks for."""
        if self.maximum == 0:
            return 1.0
        number_format = activation_format(scheme.format)
        limits: dict[str, Callable[[], float]] = {
            "max": lambda: self.maximum,
            "percentile": lambda: self.percentile(scheme.percentile),
            "mse": lambda: self.least_error_range(number_format),
        }
        return limits[scheme.observer]() * scheme.clip / number_format.highest


def calibrate(
    run: Run, probes: Sequence[Probe], windows: Sequence[Array], budget_bytes: int
) -> dict[str, InputStatistics]:
    """Return the statistics of every site's input over `windows`, by site name.

    The graph runs as often as needed for the tensors of one run over one window to stay within
    `budget_bytes`. Sites that read one tensor share one object.

    Raises:
        RecipeError: there is no calibration text, or a tensor holds a value that is not finite.

    """
    if not windows or any(window.size == 0 for window in windows):
        raise RecipeError("calibration needs at least one window of at least one token; give a longer text")
    statistics: dict[str, InputStatistics] = {}
    longest = max(window.size for window in windows)
    for batch in _batches(probes, budget_bytes // (4 * longest)):
        collectors = {probe.tensor: _Collector(probe.channels) for probe in batch}
        for values in run(windows, list(collectors)):
            for name, collector in collectors.items():
                collector.add(values.pop(name), name)
        for probe in batch:
            result = collectors[probe.tensor].result()
            statistics |= dict.fromkeys(probe.sites, result)
    return statistics


def channel_power(
    run: Run, probes: Sequence[Probe], windows: Sequence[Array], budget_bytes: int
) -> dict[str, Array]:
    """Return the root mean square of each channel [channels] of every site's input, by site name.

    Every token counts alike, brought to length one: quantizers scale by the token, and a few tokens with
    massive activations would hide the others. Runs and `budget_bytes` as in `calibrate`.
    """
    power: dict[str, Array] = {}
    longest = max(window.size for window in windows)
    for batch in _batches(probes, budget_bytes // (4 * longest)):
        sums = {probe.tensor: np.zeros(probe.channels) for probe in batch}
        for values in run(windows, list(sums)):
            for probe in batch:
                squares = np.square(values[probe.tensor].reshape(-1, probe.channels).astype(np.float64))
                lengths = squares.sum(axis=1, keepdims=True)
                sums[probe.tensor] += (squares / np.where(lengths > 0, lengths, 1)).mean(axis=0)
        for probe in batch:
            power |= dict.fromkeys(probe.sites, np.sqrt(sums[probe.tensor] / len(windows)))
    return power


def _batches(probes: Sequence[Probe], channels: int) -> Iterator[list[Probe]]:
    """Split probes into runs of at most `channels` channels together (one probe at least)."""
    batch: list[Probe] = []
    for probe in probes:
        if batch and sum(p.channels for p in batch) + probe.channels > channels:
            yield batch
            batch = []
        batch.append(probe)
    if batch:
        yield batch


class _Collector:
    """Statistics of one tensor, accumulated window by window."""

    def __init__(self, channels: int) -> None:
        self._channel_maxima = np.zeros(channels, np.float32)
        self._token_maxima: list[Array] = []
        self._moments = np.zeros(5)  # sums of x**0 ... x**4
        self._histogram = np.zeros(BINS, np.int64)

    def add(self, values: Array, name: str) -> None:
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, self._channel_maxima.size)
        magnitudes = np.abs(rows)
        tokens = magnitudes.max(axis=1)
        if not np.isfinite(tokens).all():
            raise RecipeError(
                f"calibration met a value that is not finite in '{name}'; the model overflows on this text"
            )
        self._token_maxima.append(tokens)
        np.maximum(self._channel_maxima, magnitudes.max(axis=0), out=self._channel_maxima)
        self._histogram += np.bincount(magnitudes.view(np.uint32).ravel() >> 16, minlength=BINS)
        self._add_moments(rows, np.square(rows))

    def _add_moments(self, rows: Array, squares: Array) -> None:
        flat, flat_squares = rows.ravel(), squares.ravel()
        self._moments += [
            flat.size,
            flat.sum(dtype=np.float64),
            np.dot(flat, flat),
            np.dot(flat_squares, flat),
            np.dot(flat_squares, flat_squares),
        ]

    def result(self) -> InputStatistics:
        return InputStatistics(
            np.concatenate(self._token_maxima),
            self._channel_maxima,
            _kurtosis(self._moments),
            self._histogram,
        )


def _kurtosis(moments: Array) -> float:
    """Return the fourth standardized moment from the sums of x**0 ... x**4."""
    mean, square, cube, fourth = moments[1:] / moments[0]
    variance = square - mean**2
    central = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
    return float(central / variance**2) if variance > 0 else 0.0


def _ratio(maxima: Array) -> float:
    largest = float(maxima.max())
    median = float(np.median(maxima))
    return largest / median if median > 0 else (float("inf") if largest > 0 else 1.0)
