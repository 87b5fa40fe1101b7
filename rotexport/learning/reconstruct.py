"""Block-wise reconstruction: a quantized block learns to return what the float block returns.

The block reads what the quantized blocks before it produce, and is held against what the float block made
of the float model's stream, so it also repairs what came before (EfficientQAT's Block-AP, arXiv 2407.11062,
section 3.2). The error of a token counts relative to the token's own magnitude: what reads the stream is a
norm, and the few massive tokens would otherwise drown all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotexport.blocks.calibration import BlockMethod, BlockTask, run_quantized
from rotexport.learning.precision import fast_products
from rotexport.learning.student import Student, StudentSettings, make_student
from rotexport.learning.training import BETAS, Training
from rotexport.quant.scales import QuantizedTensor


@dataclass(frozen=True)
class ReconstructMethod:
    """A `BlockMethod`: trains what another one starts from, and keeps that where training made it worse.

    `scale_type` keeps the scales of weights behind float activations.
    """

    start: BlockMethod
    training: Training
    scale_type: torch.dtype

    def solve(self, task: BlockTask) -> tuple[dict[str, QuantizedTensor], dict[str, Any]]:
        """Return what was learned, and each site's figures with the block's error before and after."""
        original = dict(task.block.weights)
        starts, figures = self.start.solve(task)
        task.block.weights.update(original)
        kinds = StudentSettings(self.scale_type, learn_clips=False)
        student = make_student(task.block, task.plan, task.edits.attention, starts, kinds)
        before = mean_error(student, task)
        with torch.enable_grad():
            reconstruct(student, task, self.training)
        after = mean_error(student, task)
        errors = {"block before learning": before, "block learned": after}
        tensors = student.tensors() if after < before else starts
        run_quantized(task, tensors)
        return tensors, {site: {**figures.get(site, {}), **errors} for site in starts}


def reconstruct(student: Student, task: BlockTask, training: Training) -> list[float]:
    """Train a block's quantizers in place; return the relative squared error at every step."""
    optimizer = torch.optim.Adam(student.groups(training), betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.rate)
    losses = []
    for batch in training.batches(task.inputs.shape[0]):
        inputs, targets = (_windows(stream, batch) for stream in (task.inputs, task.targets))
        loss = block_error(student, inputs, targets, task.context)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        student.project()
        schedule.step()
        losses.append(loss.item())
    return losses


def mean_error(student: Student, task: BlockTask) -> float:
    """Return the block's error over all windows."""
    total = 0.0
    with torch.no_grad():
        for windows in task.inputs.batches():
            inputs = task.inputs[windows]
            total += len(inputs) * float(block_error(student, inputs, task.targets[windows], task.context))
    return total / task.inputs.shape[0]


def block_error(student: Student, inputs: Tensor, targets: Tensor, context: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over tokens of |output - target|² / |target|², for [windows, tokens, width]."""
    with fast_products():
        outputs = student.block(inputs, context, student.edits)
    error = (outputs - targets).square().sum(-1)
    mean: Tensor = (error / targets.square().sum(-1)).mean()
    return mean


def _windows(stream: Any, numbers: list[int]) -> Tensor:
    return torch.cat([stream[slice(number, number + 1)] for number in numbers])
