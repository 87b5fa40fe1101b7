"""Block-wise reconstruction: a quantized block learns to return what the float block returns.

The block reads what the quantized blocks before it produce, and is held against what the float block made
of the float model's stream, so it also repairs what came before (EfficientQAT's Block-AP, arXiv 2407.11062,
section 3.2). The error of a token counts relative to the token's own magnitude: what reads the stream is a
norm, and the few massive tokens would otherwise drown all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rotexport.learning.precision import fast_products
from rotexport.learning.student import Rates, Student

Advance = Callable[[int, int], None]
WARM_UP = 0.05  # of all steps
FINAL_RATE = 0.05  # of the first
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Reconstruction:
    """How long each block learns, from how many windows at a time, and how fast. `steps` 0 skips it."""

    steps: int = 0
    batch: int = 2
    rates: Rates = field(default_factory=Rates)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Examples:
    """What a block learns from: its `inputs` and `targets`, one [S, width] per window, and its context."""

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    context: Mapping[str, Tensor]


def reconstruct(
    student: Student, examples: Examples, settings: Reconstruction, advance: Advance = lambda done, of: None
) -> list[float]:
    """Train a block's quantizers in place; return the relative squared error at every step."""
    optimizer = torch.optim.Adam(student.groups(settings.rates), betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_schedule(settings.steps))
    losses = []
    for step, batch in enumerate(batches(len(examples.inputs), settings)):
        inputs = torch.stack([examples.inputs[index] for index in batch])
        targets = torch.stack([examples.targets[index] for index in batch])
        with fast_products():
            outputs = student.block(inputs, examples.context, student.edits)
        loss = relative_error(outputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        student.project()
        schedule.step()
        losses.append(loss.item())
        advance(step + 1, settings.steps)
    return losses


def relative_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over tokens of |output − target|² / |target|², for [..., width]."""
    error = (outputs - targets).square().sum(-1)
    mean: Tensor = (error / targets.square().sum(-1)).mean()
    return mean


def rate_schedule(steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step: a linear warm-up, then a cosine."""
    warm = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        cosine = (1 + math.cos(math.pi * min(step / max(1, steps), 1))) / 2
        return min(1.0, (step + 1) / warm) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

    return factor


def batches(count: int, settings: Reconstruction) -> Iterator[list[int]]:
    """Yield `settings.steps` lists of window numbers; all windows are seen before any is seen again."""
    generator = torch.Generator().manual_seed(settings.seed)
    waiting: list[int] = []
    for _ in range(settings.steps):
        while len(waiting) < settings.batch:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[: settings.batch]
        del waiting[: settings.batch]
