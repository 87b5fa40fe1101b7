"""Distilling a whole network, from the weights that were chosen block by block to files of better ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rotexport.blocks.calibration import Network
from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import TorchBlock
from rotexport.graph.weights import Array
from rotexport.learning.distill import Teacher, distill
from rotexport.learning.student import Student, StudentSettings, make_student
from rotexport.learning.training import Advance
from rotexport.passes.quantize_weights import quantizer_of
from rotexport.quant.formats import weight_format
from rotexport.quant.plan import SitePlan
from rotexport.quant.scales import WeightQuantizer
from rotexport.quant.solved import SolvedWeight, save_solved

SCALE_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVES = 10  # of what was learned so far, in one run


@dataclass(frozen=True)
class Distilled:
    """What distillation gives: the plan with its learned clips, quantizers by site, nats a token by step."""

    plan: list[SitePlan]
    solved: dict[str, WeightQuantizer]
    losses: list[float]


def distill_network(
    network: Network,
    starts: Mapping[str, WeightQuantizer],
    windows: Array,
    folder: Path,
    advance: Advance = lambda done, of: None,
) -> Distilled:
    """Train all weights, scales and clips of a network together; results are kept in `folder`.

    Args:
        network: what to quantize, and by its recipe how to train; its graph is not changed.
        starts: quantizers by site to begin with; sites without one begin with what their scheme says.
        windows: calibration token ids [W, S].
        folder: where results go; a run that stopped there loses at most a tenth of its steps.
        advance: told (steps done, steps in all).

    Raises:
        RecipeError: a site has static activations, or a format that is not an integer's.

    """
    training = network.recipe.distill
    split = split_blocks(network.graph)
    teacher = Teacher(split, [TorchBlock(block) for block in split.blocks], split.context(windows.shape[1]))
    kinds = StudentSettings(SCALE_TYPES[network.recipe.dtype], training.clip_rate > 0)
    students = [_student(network, block, starts, kinds) for block in teacher.blocks]
    progress = _Progress(folder / "distillation.pt", students)
    every = max(1, training.steps // SAVES)
    for step, loss in distill(teacher, students, list(windows), training, progress.load()):
        progress.losses.append(loss)
        if step % every == 0:
            progress.save()
        advance(step, training.steps)
    return _export(network, students, folder, progress.losses)


def _student(
    network: Network, block: TorchBlock, starts: Mapping[str, WeightQuantizer], kinds: StudentSettings
) -> Student:
    plan = {site.site: site for site in network.plan}
    tensors = {
        name: (starts.get(name) or quantizer_of(plan[name])).quantize(weight.numpy())
        for name, weight in block.weights.items()
        if plan[name].weights.enabled
    }
    return make_student(block, plan, network.edits(block.block).attention, tensors, kinds)


def _export(network: Network, students: Sequence[Student], folder: Path, losses: list[float]) -> Distilled:
    plan = list(network.plan)
    solved: dict[str, WeightQuantizer] = {}
    for student in students:
        path = folder / f"distilled-{student.block.block.index}.npz"
        save_solved(path, student.tensors())
        plan = [student.planned(site) for site in plan]
        for site in plan:
            if site.site in student.weights:
                number_format = weight_format(site.weights.format)
                solved[site.site] = SolvedWeight(path, site.site, number_format, site.weight_group)
    return Distilled(plan, solved, losses)


class _Progress:
    """What was learned so far, in one file that is replaced whole."""

    def __init__(self, path: Path, students: Sequence[Student]) -> None:
        self.path = path
        self.losses: list[float] = []
        self._modules = torch.nn.ModuleList([student.modules() for student in students])

    def load(self) -> int:
        """Continue where an earlier run saved; return the steps it had done."""
        if self.path.exists():
            kept = torch.load(self.path, weights_only=True)
            self._modules.load_state_dict(kept["state"])
            self.losses = list(kept["losses"])
        return len(self.losses)

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        torch.save({"state": self._modules.state_dict(), "losses": self.losses}, partial)
        partial.rename(self.path)
