"""FlatQuant (arXiv 2410.09426): affine transforms and clips, learned block by block.

A block's transforms and clips descend together on the relative error of its quantized output, on the float
network's own stream (`rotexport.learning.flat_block` says what is learned where). What a block learned and
the stream behind it are on disk before the next one begins, so an interrupted run loses one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rotexport.blocks.calibration import Network, claim, run_digest
from rotexport.blocks.split import BlockGraph, split_blocks
from rotexport.blocks.stream import Stream
from rotexport.blocks.torch_block import TorchBlock
from rotexport.graph.basis import analyse
from rotexport.graph.weights import Array
from rotexport.learning.flat_block import FlatBlock, Flattening, Group, Quantizers, value_path
from rotexport.learning.precision import fast_products
from rotexport.learning.rotations import quantizers
from rotexport.learning.training import Advance, AffineTraining
from rotexport.quant.clipped import save_clips
from rotexport.quant.plan import SitePlan

SMOOTHING = 0.3  # how much of an uneven channel the first scales take out of the activation
SMALLEST = 1e-5


@dataclass(frozen=True, eq=False)
class Lesson:
    """A block with the windows it learns from: streams before and behind it, and their context."""

    block: TorchBlock
    inputs: Stream
    targets: Stream
    context: Mapping[str, Tensor]


@dataclass(frozen=True)
class LearnedTransforms:
    """What was learned, the plan with its clips, and each block's error before and after learning."""

    flattening: Flattening
    plan: list[SitePlan]
    errors: dict[int, tuple[float, float]]

    @property
    def note(self) -> str:
        """What a reader of the report should know."""
        before, after = (sum(error[end] for error in self.errors.values()) for end in (0, 1))
        count = len(self.errors)
        return f"transforms learned: mean error of a block {before / count:.4g} to {after / count:.4g}"


def learn_affine(
    network: Network, windows: Array, folder: Path, advance: Advance = lambda done, of: None
) -> LearnedTransforms:
    """Learn the transforms of all blocks, and clips if the recipe wants them.

    Args:
        network: what to quantize; its graph is not changed.
        windows: calibration token ids [W, S], of which the first are used.
        folder: where results and two streams are kept; a run that stopped there continues.
        advance: told (blocks done, blocks in all).

    Raises:
        OutputError: `folder` holds another run.

    """
    training = network.recipe.learn_affine
    plan = [replace(site, activations=replace(site.activations, mode="dynamic")) for site in network.plan]
    folder.mkdir(parents=True, exist_ok=True)
    chosen = windows[: training.windows]
    claim(folder, run_digest(network, training, chosen))
    course = _Course(replace(network, plan=plan), chosen, folder)
    learned, errors = Flattening(), {}
    for number, block in enumerate(course.split.blocks):
        found, errors[block.index] = course.learn(block)
        learned |= found
        advance(number + 1, len(course.split.blocks))
    course.streams_removed()
    return LearnedTransforms(learned, [course.planned(site, learned) for site in network.plan], errors)


class _Course:
    """Goes from block to block; everything that is needed to go on lies in `folder`."""

    def __init__(self, network: Network, windows: Array, folder: Path) -> None:
        self.network, self.windows, self.folder = network, windows, folder
        self.split = split_blocks(network.graph)
        self.context = self.split.context(windows.shape[1])
        self._bases = analyse(network.graph)
        width = int(network.graph.tensors()[self.split.blocks[0].input].shape[-1])
        self._shape = (*windows.shape, width)

    def learn(self, graph: BlockGraph) -> tuple[Flattening, tuple[float, float]]:
        """Return what a block learned, now or in an earlier run, and its error before and after."""
        block, kept = TorchBlock(graph), self.folder / f"block-{graph.index}.pt"
        if not kept.is_file():
            self._compute(graph, block, kept)
        state = torch.load(kept, weights_only=True)
        units = {group: torch.ones(len(block.weights[group[0]])) for group in self._groups(block)}
        module = self._module(graph, block, units)
        module.load_state_dict(state["state"])
        before, after = state["errors"]
        return module.export(), (before, after)

    def planned(self, site: SitePlan, learned: Flattening) -> SitePlan:
        """Return a site's plan with what was learned for its clips."""
        site = learned.clipped(site)
        block = site.site.partition(".")[0]
        if not block.isdigit() or not site.weights.enabled or site.weights.method == "gptq":
            return site
        path = self._clips(int(block))
        return replace(site, clips=path) if path.is_file() else site

    def streams_removed(self) -> None:
        """Delete what leaves the last block."""
        for path in self.folder.glob("*.stream"):
            path.unlink()

    def _compute(self, graph: BlockGraph, block: TorchBlock, kept: Path) -> None:
        inputs, targets = (Stream(self._stream(graph.index + step), self._shape) for step in (0, 1))
        with torch.no_grad():
            if graph.index == 0:
                for number, window in enumerate(self.windows):
                    inputs[slice(number, number + 1)] = self.split.embed(window)
            for batch in inputs.batches():
                targets[batch] = block(inputs[batch], self.context)
        lesson = Lesson(block, inputs, targets, self.context)
        module = self._module(graph, block, self._scales(lesson))
        plain, edits = quantizers(self.network, graph)
        before = mean_error(lesson, lambda x: block(x, self.context, replace(edits, weights=plain)))
        if not module.empty:
            train(module, lesson, self.network.recipe.learn_affine)
        after = mean_error(lesson, lambda x: module(x, self.context))
        ratios = {site: rounding.ratios() for site, rounding in module.quantizers.weights.items()}
        known = {site: ratio.numpy() for site, ratio in ratios.items() if ratio is not None}
        if known:
            save_clips(self._clips(graph.index), known)
        partial = kept.with_suffix(".partial")
        torch.save({"state": module.state_dict(), "errors": [before, after]}, partial)
        targets.flush()
        partial.rename(kept)
        inputs.remove()

    def _module(self, graph: BlockGraph, block: TorchBlock, scales: Mapping[Group, Tensor]) -> FlatBlock:
        training = self.network.recipe.learn_affine
        weights, edits = quantizers(self.network, graph, learn_clips=training.clip_rate > 0)
        standing = Quantizers(edits.inputs, weights, edits.attention)
        return FlatBlock(block, value_path(block, self._bases), scales, standing, training.seed)

    def _groups(self, block: TorchBlock) -> list[Group]:
        """Return the sites that share a quantized input."""
        plan = {site.site: site for site in self.network.plan}
        return [group for group in block.groups if all(plan[site].activations.enabled for site in group)]

    def _scales(self, lesson: Lesson) -> dict[Group, Tensor]:
        """Return the scales that the transforms of a block begin with, from the largest magnitudes."""
        block = lesson.block
        names = {group: block.input_of[group[0]] for group in self._groups(block)}
        with torch.no_grad():
            x = lesson.inputs[slice(0, 1)]
            seen = block.run(block.begin(x, lesson.context), names.values())
        return {
            group: _scale(seen[name], [block.weights[site] for site in group])
            for group, name in names.items()
        }

    def _stream(self, index: int) -> Path:
        return self.folder / f"stream-{index}.stream"

    def _clips(self, index: int) -> Path:
        return self.folder / f"clips-{index}.npz"


def train(module: FlatBlock, lesson: Lesson, training: AffineTraining) -> None:
    """Train a block's transforms and clips in place."""
    groups = [(training.rate, module.transform_parameters()), (training.clip_rate, module.clip_parameters())]
    rates = [{"params": parameters, "lr": rate} for rate, parameters in groups if parameters and rate]
    optimizer = torch.optim.Adam(rates, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.factor)
    for batch in training.batches(lesson.inputs.shape[0]):
        inputs, targets = (
            torch.cat([stream[slice(number, number + 1)] for number in batch])
            for stream in (lesson.inputs, lesson.targets)
        )
        with torch.enable_grad():
            with fast_products():
                outputs = module(inputs, lesson.context)
            loss = relative_error(outputs, targets).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()


def mean_error(lesson: Lesson, block: Callable[[Tensor], Tensor]) -> float:
    """Return the mean over all tokens of a quantized block's relative squared error."""
    total = 0.0
    with torch.no_grad():
        for batch in lesson.inputs.batches():
            error = relative_error(block(lesson.inputs[batch]), lesson.targets[batch])
            total += float(error.mean(-1).sum())
    return total / lesson.inputs.shape[0]


def relative_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return |output - target|² / |target|² of every token, for [windows, tokens, width]."""
    error: Tensor = (outputs - targets).square().sum(-1) / targets.square().sum(-1)
    return error


def _scale(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return c = w^(1-α) / x^α of FlatQuant, from largest magnitudes, relative to its own mean."""
    largest = x.abs().flatten(0, -2).amax(0).clamp_min(SMALLEST)
    widest = torch.stack([weight.abs().amax(1) for weight in weights]).amax(0).clamp_min(SMALLEST)
    scale = widest ** (1 - SMOOTHING) / largest**SMOOTHING
    return scale / scale.mean()
