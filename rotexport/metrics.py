"""How far two computations of the same thing are apart.

Everything accumulates in float64, in blocks of rows: logits of a thousand tokens over a large vocabulary fit
in memory once, not five times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from rotexport.errors import RecipeError

if TYPE_CHECKING:
    from rotexport.graph.weights import Array

BLOCK_ELEMENTS = 1 << 22  # float64 elements worked on at a time: 32 MB
EQUAL_DB = 300.0  # ratio reported for equal tensors, far beyond what float64 can resolve


@dataclass(frozen=True)
class Comparison:
    """Logits of a candidate against those of a reference, over the same tokens.

    Attributes:
        tokens: rows compared.
        max_abs_error: largest absolute difference of two logits.
        logit_scale: largest absolute reference logit, what `max_abs_error` is to be read against.
        sqnr_db: signal power over error power, in decibels.
        cosine: cosine of the two, seen as one long vector.
        kl: mean over tokens of KL(reference || candidate), in nats.
        top1_agreement: fraction of tokens whose most likely successor is the same.

    """

    tokens: int
    max_abs_error: float
    logit_scale: float
    sqnr_db: float
    cosine: float
    kl: float
    top1_agreement: float

    @property
    def relative_error(self) -> float:
        """Largest error over largest logit."""
        return self.max_abs_error / self.logit_scale if self.logit_scale else self.max_abs_error

    def to_dict(self) -> dict[str, float]:
        """Return the fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ThresholdResult:
    """One threshold against the figure it limits."""

    name: str
    limit: float
    value: float
    passed: bool

    @property
    def title(self) -> str:
        """What the figure is, in words."""
        return FIGURES[self.name]

    @property
    def bound(self) -> str:
        """Which side of the limit is asked for."""
        return "at least" if self.name in _LOWER_BOUNDS else "at most"

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"missed: {self.name} could not be measured, {self.bound} {self.limit:.6g} was asked"
        verdict = "" if self.passed else "missed: "
        return f"{verdict}{self.name} is {self.value:.6g}, {self.bound} {self.limit:.6g} was asked"


FIGURES = {
    "max_abs_error": "largest logit error",
    "relative_error": "largest logit error over largest logit",
    "kl": "KL divergence, nats per token",
    "perplexity_ratio": "perplexity over PyTorch's",
    "top1_agreement": "fraction of tokens with the same most likely successor",
    "sqnr_db": "signal over error at the logits, dB",
    "cosine": "cosine of the logits",
    "block_sqnr_db": "signal over error at the worst block, dB",
}
_LOWER_BOUNDS = frozenset({"sqnr_db", "cosine", "top1_agreement", "block_sqnr_db"})


@dataclass(frozen=True)
class Thresholds:
    """What a build must reach against the PyTorch model; None is not checked.

    At most: `max_abs_error` (logits), `relative_error` (of the largest logit), `kl` (nats per token),
    `perplexity_ratio` (candidate over reference). At least: `top1_agreement` (fraction of tokens), `sqnr_db`
    and `cosine` (logits), `block_sqnr_db` (every block's output, median token).
    """

    max_abs_error: float | None = None
    relative_error: float | None = None
    kl: float | None = None
    perplexity_ratio: float | None = None
    top1_agreement: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    block_sqnr_db: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            limit = getattr(self, item.name)
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float))):
                raise RecipeError(f"thresholds.{item.name}: {limit!r} is not a number; give one, or null")

    def check(self, figures: Mapping[str, float]) -> list[ThresholdResult]:
        """Compare every threshold that is set; a figure that is missing or not a number fails."""
        results = []
        for item in fields(self):
            limit, value = getattr(self, item.name), figures.get(item.name, math.nan)
            if limit is not None:
                passed = value >= limit if item.name in _LOWER_BOUNDS else value <= limit
                results.append(ThresholdResult(item.name, float(limit), value, passed))
        return results


def compare_logits(reference: Array, candidate: Array) -> Comparison:
    """Compare logits [..., vocab] with candidate logits of the same shape."""
    _check_shapes(reference, candidate)
    vocabulary = reference.shape[-1]
    rows = reference.size // vocabulary
    reference, candidate = reference.reshape(rows, vocabulary), candidate.reshape(rows, vocabulary)
    divergence = agreeing = 0.0
    for block in _blocks(rows, vocabulary):
        expected, actual = log_softmax(reference[block]), log_softmax(candidate[block])
        divergence += float(np.sum(np.exp(expected) * (expected - actual)))
        agreeing += float(np.sum(expected.argmax(axis=-1) == actual.argmax(axis=-1)))
    moments = _Moments.of(reference, candidate)
    return Comparison(
        tokens=rows,
        max_abs_error=moments.largest_error,
        logit_scale=moments.largest_reference,
        sqnr_db=moments.sqnr_db,
        cosine=moments.cosine,
        kl=max(divergence / rows, 0.0),
        top1_agreement=agreeing / rows,
    )


def max_abs_error(reference: Array, candidate: Array) -> float:
    """Return the largest absolute difference."""
    return _Moments.of(reference, candidate).largest_error


def sqnr_db(reference: Array, candidate: Array) -> float:
    """Return 10 log10(sum r^2 / sum (r - c)^2), within plus and minus `EQUAL_DB`."""
    return _Moments.of(reference, candidate).sqnr_db


def token_sqnr_db(reference: Array, candidate: Array) -> Array:
    """Return the ratio of `sqnr_db` for every token [S] of the activations [S, D].

    An attention-sink token can hold nearly all power of a stream: one ratio would see nothing else.
    """
    _check_shapes(reference, candidate)
    r = reference.astype(np.float64)
    return _decibels(np.square(r).sum(axis=-1), np.square(r - candidate).sum(axis=-1))


def cosine(reference: Array, candidate: Array) -> float:
    """Return <r, c> / (|r| |c|); 1 when both are zero, 0 when one is."""
    return _Moments.of(reference, candidate).cosine


def log_softmax(logits: Array) -> Array:
    """Return the log probabilities of logits [..., vocab], in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def negative_log_likelihood(logits: Array, targets: Array) -> float:
    """Return the summed loss of the tokens `targets` [S] under the logits [S, vocab], in nats."""
    rows, vocabulary = logits.shape
    if targets.shape != (rows,):
        raise ValueError(f"targets of shape {targets.shape} do not fit logits of shape {logits.shape}")
    total = 0.0
    for block in _blocks(rows, vocabulary):
        chosen = np.take_along_axis(log_softmax(logits[block]), targets[block, None], axis=-1)
        total -= float(chosen.sum())
    return total


@dataclass(frozen=True)
class _Moments:
    signal: float
    other: float
    product: float
    noise: float
    largest_error: float
    largest_reference: float

    @classmethod
    def of(cls, reference: Array, candidate: Array) -> _Moments:
        _check_shapes(reference, candidate)
        expected, actual = reference.reshape(-1), candidate.reshape(-1)
        sums = np.zeros(4)
        largest_error = largest_reference = 0.0
        for block in _blocks(expected.size, 1):
            r, c = expected[block].astype(np.float64), actual[block].astype(np.float64)
            error = r - c
            sums += r @ r, c @ c, r @ c, error @ error
            largest_error = np.maximum(largest_error, np.abs(error).max())  # unlike max(), keeps NaN
            largest_reference = np.maximum(largest_reference, np.abs(r).max())
        return cls(*map(float, (*sums, largest_error, largest_reference)))

    @property
    def sqnr_db(self) -> float:
        return float(_decibels(np.array(self.signal), np.array(self.noise)))

    @property
    def cosine(self) -> float:
        norms = np.sqrt(self.signal) * np.sqrt(self.other)
        if norms == 0.0:
            return 1.0 if self.signal == self.other else 0.0
        return float(self.product / norms)


def _decibels(signal: Array, noise: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = np.clip(10 * np.log10(signal / noise), -EQUAL_DB, EQUAL_DB)
    return np.where(noise == 0.0, EQUAL_DB, ratio)


def _check_shapes(reference: Array, candidate: Array) -> None:
    if reference.shape != candidate.shape:
        raise ValueError(f"cannot compare shape {candidate.shape} with the reference's {reference.shape}")


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, rows, step):
        yield slice(start, start + step)
