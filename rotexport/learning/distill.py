"""End-to-end distillation: the whole quantized network learns the float network's distribution.

Blocks that each return nearly what they should still add up their errors, and what an error costs depends on
what later blocks make of it. Here all quantizers learn together from the Kullback-Leibler divergence between
the float network's next-token distribution and the quantized one's, on the same text: no labels, so nothing
pulls the model towards the calibration text beyond what it knew already.

Memory holds every learned number, its gradient and two moments, besides the float weights; activations of
all blocks, or, where those would be many, the stream at every block, each being recomputed (gradient
checkpointing) when its gradient is due.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rotexport.blocks.split import Split
from rotexport.blocks.torch_block import NO_EDITS, Edits, TorchBlock
from rotexport.graph.weights import Array
from rotexport.learning.precision import fast_products
from rotexport.learning.student import Student
from rotexport.learning.training import BETAS, Training

RESIDENT_BYTES = 3 << 30  # of activations, above which blocks are recomputed
BYTES_PER_CHANNEL = 32  # of activations kept for a linear: input, steps, codes and output, a few times over


@dataclass(frozen=True, eq=False)
class Teacher:
    """A float decoder as blocks in memory, from token ids to logits; `edits`, one a block, quantize it."""

    split: Split
    blocks: Sequence[TorchBlock]
    context: Mapping[str, Tensor]

    def logits(self, windows: Sequence[Array], edits: Sequence[Edits] | None = None) -> Tensor:
        """Return logits [windows, S, vocabulary] of token ids [S]."""
        return self.split.logits(self.states(windows, edits))

    def states(self, windows: Sequence[Array], edits: Sequence[Edits] | None = None) -> Tensor:
        """Return what leaves the last block, [windows, S, width], for token ids [S]."""
        x = torch.cat([self.split.embed(window) for window in windows])
        recompute = torch.is_grad_enabled() and self._kept_bytes(x) > RESIDENT_BYTES
        for block, edit in zip(self.blocks, edits or [NO_EDITS] * len(self.blocks), strict=True):
            if recompute:
                x = checkpoint(block, x, self.context, edit, use_reentrant=False)
            else:
                x = block(x, self.context, edit)
        return x

    def _kept_bytes(self, x: Tensor) -> int:
        channels: int = sum(sum(weight.shape) for block in self.blocks for weight in block.weights.values())
        return int(x.shape[0] * x.shape[1]) * channels * BYTES_PER_CHANNEL


def distill(
    teacher: Teacher,
    students: Sequence[Student],
    windows: Sequence[Array],
    training: Training,
    start: int = 0,
) -> Iterator[tuple[int, float]]:
    """Train the quantizers of all blocks in place, from step `start` on.

    Yields (steps done, divergence in nats a token) after every step.
    """
    optimizer = torch.optim.Adam(_groups(students, training), betas=BETAS, fused=True)
    lessons = _Lessons(teacher, windows)
    for step, batch in enumerate(training.batches(len(windows))):
        if step < start:
            continue
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * training.rate(step)
        with torch.enable_grad():
            loss = lessons.loss(students, batch)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        for student in students:
            student.project()
        yield step + 1, loss.item()


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return the mean over tokens of KL(target ‖ ours), for logits [..., vocabulary]."""
    expected = functional.log_softmax(target.float(), -1).flatten(0, -2)
    ours = functional.log_softmax(logits.float(), -1).flatten(0, -2)
    return functional.kl_div(ours, expected, reduction="batchmean", log_target=True)


class _Lessons:
    """Windows, and what the float network makes of them: computed once, where the head begins."""

    def __init__(self, teacher: Teacher, windows: Sequence[Array]) -> None:
        self.teacher, self.windows = teacher, windows
        self._states: dict[int, Tensor] = {}

    def loss(self, students: Sequence[Student], numbers: Sequence[int]) -> Tensor:
        """Return the students' divergence on some windows."""
        head = self.teacher.split.logits
        with fast_products():
            with torch.no_grad():
                target = head(torch.cat([self._exact(number) for number in numbers]))
            windows = [self.windows[number] for number in numbers]
            return divergence(target, head(self.teacher.states(windows, [s.edits for s in students])))

    def _exact(self, number: int) -> Tensor:
        if number not in self._states:
            self._states[number] = self.teacher.states([self.windows[number]])
        return self._states[number]


def _groups(students: Sequence[Student], training: Training) -> list[dict[str, Any]]:
    """Merge the groups of all blocks, so that each kind of parameter is one."""
    merged: dict[float, list[torch.nn.Parameter]] = {}
    for student in students:
        for group in student.groups(training):
            merged.setdefault(group["lr"], []).extend(group["params"])
    return [{"params": params, "lr": rate, "rate": rate} for rate, params in merged.items()]
