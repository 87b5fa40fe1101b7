"""How long and how fast quantizers learn: what a recipe says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rotexport.errors import RecipeError

Advance = Callable[[int, int], None]
WARM_UP = 0.05  # of all steps
LOSSES = ("block", "network")  # of rotations
FINAL_RATE = 0.05  # of the first
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Training:
    """Adam for `steps` steps (0: none) of `batch` windows each, the rates falling along a cosine.

    `weight_rate` is in steps of a weight's grid, so it fits every model; `scale_rate` is of the logarithm of
    a scale, `clip_rate` of the logit of a clip. A rate of 0 leaves its kind as it is.
    """

    steps: int = 0
    batch: int = 1
    weight_rate: float = 0.01
    scale_rate: float = 0.002
    clip_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("steps", "seed"):
            if not _is_count(getattr(self, key)):
                raise RecipeError(f"{key}: {getattr(self, key)!r} is not a non-negative integer")
        if not _is_count(self.batch) or self.batch == 0:
            raise RecipeError(f"batch: {self.batch!r} is not a positive number of windows")
        for key in ("weight_rate", "scale_rate", "clip_rate"):
            rate = getattr(self, key)
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
                raise RecipeError(f"{key}: {rate!r} is not at least 0 and below 1")
        if self.steps and not (self.weight_rate or self.scale_rate or self.clip_rate):
            raise RecipeError("all rates are 0, so nothing would be learned; set steps to 0")

    @property
    def enabled(self) -> bool:
        """Whether there is anything to do."""
        return self.steps > 0

    def rate(self, step: int) -> float:
        """Return the factor of the learning rates at a step: a linear warm-up, then a cosine."""
        warm = max(1, round(WARM_UP * self.steps))
        return min(1.0, (step + 1) / warm) * (FINAL_RATE + (1 - FINAL_RATE) * cosine(step, self.steps))

    def batches(self, count: int) -> Iterator[list[int]]:
        """Return the numbers of each step's windows; all are seen before any is seen again."""
        return draw(count, self.steps, self.batch, self.seed)


@dataclass(frozen=True)
class RotationTraining:
    """Cayley SGD for `steps` steps of `batch` windows each, `rate` falling along a cosine.

    `loss` "network" is the divergence from the float network's distribution, with the whole network in
    memory. "block" is the relative error of one block's output, of a block drawn at random; memory holds that
    block, the disk the stream of `windows` windows at every block. No step turns by more than about a radian.
    """

    steps: int = 0
    batch: int = 1
    rate: float = 1.5
    momentum: float = 0.9
    loss: str = "block"
    windows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _check_counts({key: getattr(self, key) for key in ("steps", "batch", "windows", "seed")})
        if self.loss not in LOSSES:
            raise RecipeError(f"loss: {self.loss!r} is not one of {', '.join(LOSSES)}")
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not self.rate > 0:
            raise RecipeError(f"rate: {self.rate!r} is not above 0")
        if not isinstance(self.momentum, int | float) or not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum: {self.momentum!r} is not at least 0 and below 1")

    @property
    def enabled(self) -> bool:
        """Whether there is anything to do."""
        return self.steps > 0


@dataclass(frozen=True)
class AffineTraining:
    """Adam for `steps` steps a block (0: none) of `batch` windows of the first `windows`; rates fall.

    `rate` is of the transforms, `clip_rate` of the logits of clips, of weights and dynamic activations; at 0
    none are learned. Weights that GPTQ chooses have no clip.
    """

    steps: int = 0
    batch: int = 1
    rate: float = 0.005
    clip_rate: float = 0.0
    windows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _check_counts({key: getattr(self, key) for key in ("steps", "batch", "windows", "seed")})
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate < 1:
            raise RecipeError(f"rate: {self.rate!r} is not above 0 and below 1")
        if isinstance(self.clip_rate, bool) or not isinstance(self.clip_rate, int | float):
            raise RecipeError(f"clip_rate: {self.clip_rate!r} is not a number")
        if not 0 <= self.clip_rate < 1:
            raise RecipeError(f"clip_rate: {self.clip_rate!r} is not at least 0 and below 1")

    @property
    def enabled(self) -> bool:
        """Whether there is anything to do."""
        return self.steps > 0

    def factor(self, step: int) -> float:
        """Return the factor of the rate at a step."""
        return cosine(step, self.steps)

    def batches(self, count: int) -> Iterator[list[int]]:
        """Return the numbers of each step's windows."""
        return draw(count, self.steps, self.batch, self.seed)


def draw(count: int, times: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield `times` lists of `size` of `count` numbers; all are drawn before any is drawn again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(times):
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        del waiting[:size]


def cosine(step: int, steps: int) -> float:
    """Return half a cosine wave: 1 at step 0, 0 at the end."""
    return (1 + math.cos(math.pi * min(step / max(1, steps), 1))) / 2


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_counts(counts: Mapping[str, Any]) -> None:
    for key, value in counts.items():
        least = 0 if key in ("steps", "seed") else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RecipeError(f"{key}: {value!r} is not an integer of at least {least}")
