"""Learning the weights of a network: block by block, then all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rotexport.blocks.calibration import BlockMethod, Network, chosen_tensors
from rotexport.blocks.gptq_blocks import GptqMethod
from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import TorchBlock
from rotexport.errors import RecipeError
from rotexport.graph.weights import Array
from rotexport.learning.distill import Teacher, distill
from rotexport.learning.reconstruct import ReconstructMethod
from rotexport.learning.student import Student, StudentSettings, make_student
from rotexport.learning.training import Advance
from rotexport.quant.formats import weight_format
from rotexport.quant.plan import SitePlan
from rotexport.quant.scales import WeightQuantizer
from rotexport.quant.solved import SolvedWeight, save_solved
from rotexport.recipe import Recipe

SCALE_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVES = 10  # of what was learned so far, in one run


@dataclass(frozen=True)
class Distilled:
    """What distillation gives: the plan with its learned clips, quantizers by site, nats a token by step."""

    plan: list[SitePlan]
    solved: dict[str, WeightQuantizer]
    losses: list[float]

    @property
    def note(self) -> str:
        """What a reader of the report should know."""
        ends = max(1, len(self.losses) // 10)
        first, last = (sum(part) / ends for part in (self.losses[:ends], self.losses[-ends:]))
        return f"distilled for {len(self.losses)} steps: {first:.4g} to {last:.4g} nats per token (KL)"


def check_learnable(plan: Sequence[SitePlan]) -> None:
    """Check that all quantized weights can be learned, before any is read.

    Raises:
        RecipeError: no weight is quantized, activations are static, or a format is not an integer's.

    """
    if not any(site.weights.enabled for site in plan):
        raise RecipeError("reconstruct and distill train quantized weights; set weights.format")
    for site in plan:
        other = {site.weights.format, site.activations.format} - {"none", "int8", "int4"}
        if other:
            raise RecipeError(
                f"site {site.site}: reconstruct and distill train int8 and int4, not {', '.join(other)}; "
                "set their steps to 0"
            )
        if site.activations.enabled and site.activations.mode == "static":
            raise RecipeError(
                f"site {site.site}: reconstruct and distill train behind dynamic activations only; "
                "set activations.mode: dynamic, or their steps to 0"
            )


def block_method(recipe: Recipe) -> BlockMethod:
    """Return how a recipe chooses the weights of a block."""
    method = GptqMethod(recipe.gptq)
    if not recipe.reconstruct.enabled:
        return method
    return ReconstructMethod(method, recipe.reconstruct, SCALE_TYPES[recipe.dtype])


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
    """
    training = network.recipe.distill
    folder.mkdir(parents=True, exist_ok=True)
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
    tensors = chosen_tensors(network, starts, block)
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
                number_format = weight_format(site.weights.format, site.weights.symmetric)
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
