"""End-to-end distillation: the whole quantized network learns the float network's distribution.

Blocks that each return nearly what they should still add up their errors, and what an error costs depends on
what later blocks make of it. Here all quantizers learn together from the Kullback-Leibler divergence between
the float network's next-token distribution and the quantized one's, on the same text: no labels, so nothing
pulls the model towards the calibration text beyond what it knew already.

Blocks are recomputed in the backward pass (gradient checkpointing): memory holds the stream at every block,
one block's activations, and for every learned number itself, its gradient and two moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rotexport.blocks.split import Split
from rotexport.blocks.torch_block import NO_EDITS, Edits, TorchBlock
from rotexport.graph.weights import Array
from rotexport.learning.precision import fast_products
from rotexport.learning.reconstruct import BETAS, Advance, batches, rate_schedule
from rotexport.learning.student import Rates, Student


@dataclass(frozen=True)
class Distillation:
    """How long the network learns, from how many windows at a time, and how fast. `steps` 0 skips it."""

    steps: int = 0
    batch: int = 1
    rates: Rates = field(default_factory=Rates)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Network:
    """A float decoder as blocks in memory, from token ids to logits."""

    split: Split
    blocks: Sequence[TorchBlock]
    context: Mapping[str, Tensor]

    def logits(self, windows: Sequence[Array], edits: Sequence[Edits] | None = None) -> Tensor:
        """Return logits [windows, S, vocabulary] of token ids [S]; with `edits`, one for each block."""
        x = torch.cat([self.split.embed(window) for window in windows])
        for block, edit in zip(self.blocks, edits or [NO_EDITS] * len(self.blocks), strict=True):
            if torch.is_grad_enabled():
                x = checkpoint(block, x, self.context, edit, use_reentrant=False)
            else:
                x = block(x, self.context, edit)
        return self.split.logits(x)


def distill(
    network: Network,
    students: Sequence[Student],
    windows: Sequence[Array],
    settings: Distillation,
    advance: Advance = lambda done, of: None,
) -> list[float]:
    """Train the quantizers of all blocks in place; return the divergence, in nats a token, at every step."""
    optimizer = torch.optim.Adam(_groups(students, settings.rates), betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_schedule(settings.steps))
    losses = []
    for step, batch in enumerate(batches(len(windows), settings)):
        chosen = [windows[index] for index in batch]
        loss = _divergence(network, [student.edits for student in students], chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for student in students:
            student.project()
        schedule.step()
        losses.append(loss.item())
        advance(step + 1, settings.steps)
    return losses


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return the mean over tokens of KL(target ‖ ours), for logits [..., vocabulary]."""
    expected = functional.log_softmax(target.float(), -1).flatten(0, -2)
    ours = functional.log_softmax(logits.float(), -1).flatten(0, -2)
    return functional.kl_div(ours, expected, reduction="batchmean", log_target=True)


def _divergence(network: Network, edits: Sequence[Edits], windows: Sequence[Array]) -> Tensor:
    with fast_products():
        with torch.no_grad():
            target = network.logits(windows)
        return divergence(target, network.logits(windows, edits))


def _groups(students: Sequence[Student], rates: Rates) -> list[dict[str, Any]]:
    """Merge the groups of all blocks, so that each kind of parameter is one."""
    merged: dict[float, list[torch.nn.Parameter]] = {}
    for student in students:
        for group in student.groups(rates):
            merged.setdefault(group["lr"], []).extend(group["params"])
    return [{"params": params, "lr": rate} for rate, params in merged.items()]
