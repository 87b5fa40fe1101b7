"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rotexport.errors import ValidationError

if TYPE_CHECKING:
    from rotexport.graph.weights import Array


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the likeliest token; otherwise one of the likeliest that share `top_p` is drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValidationError(f"temperature {self.temperature} is not a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValidationError(f"top-p {self.top_p} is not above 0 and at most 1")

    def sampler(self) -> Callable[[Array], int]:
        """Return a function from logits [vocabulary] to a token, with a random state of its own."""
        rng = np.random.default_rng(self.seed)

        def choose(logits: Array) -> int:
            if self.temperature == 0:
                return int(np.argmax(logits))
            tokens, weights = self.candidates(logits)
            return int(rng.choice(tokens, p=weights))

        return choose

    def candidates(self, logits: Array) -> tuple[Array, Array]:
        """Return the fewest likeliest tokens that reach `top_p` together, and their renormalized shares."""
        scaled = logits.astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        kept = order[before < self.top_p]
        return kept, weights[kept] / weights[kept].sum()


GREEDY = Sampling()
