"""FlatQuant (arXiv 2410.09426): an affine transform in front of the linears, learned block by block.

Every input of quantized linears gets one Kronecker transform, shared by the linears that read it. A block's
transforms descend on the relative error of its quantized output, on the float network's own stream. They run
online; their inverses fold into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rotexport.blocks.calibration import Network
from rotexport.blocks.split import split_blocks
from rotexport.blocks.stream import Stream
from rotexport.blocks.torch_block import Edit, Edits, TorchBlock
from rotexport.graph.weights import Array
from rotexport.learning.affine import KroneckerAffine
from rotexport.learning.precision import fast_products
from rotexport.learning.rotations import quantizers
from rotexport.learning.training import Advance, AffineTraining
from rotexport.transforms.transform import Transform

SMOOTHING = 0.3  # how much of an uneven channel the first scales take out of the activation
SMALLEST = 1e-5


@dataclass(frozen=True, eq=False)
class Lesson:
    """A block with the windows it learns from: streams before and behind it, and their context."""

    network: Network
    block: TorchBlock
    inputs: Stream
    targets: Stream
    context: Mapping[str, Tensor]


def learn_affine(
    network: Network, windows: Array, folder: Path, advance: Advance = lambda done, of: None
) -> dict[tuple[str, ...], Transform]:
    """Return the transform of every input that quantized linears read, by the sites that read it.

    Learns on the first of some windows [W, S]; streams are kept in `folder`, two at a time.
    """
    training = network.recipe.learn_affine
    plan = [replace(site, activations=replace(site.activations, mode="dynamic")) for site in network.plan]
    network = replace(network, plan=plan)
    split = split_blocks(network.graph)
    chosen, context = windows[: training.windows], split.context(windows.shape[1])
    first = [split.embed(window) for window in chosen]
    stream = Stream(folder / "affine-0.stream", (*chosen.shape, first[0].shape[-1]))
    for index, x in enumerate(first):
        stream[slice(index, index + 1)] = x
    learned: dict[tuple[str, ...], Transform] = {}
    for place, graph in enumerate(split.blocks):
        block = TorchBlock(graph)
        behind = Stream(folder / f"affine-{place + 1}.stream", stream.shape)
        with torch.no_grad():
            for batch in stream.batches():
                behind[batch] = block(stream[batch], context)
        learned |= _learn_block(Lesson(network, block, stream, behind, context), training)
        stream.remove()
        stream = behind
        advance(place + 1, len(split.blocks))
    stream.remove()
    return learned


def _learn_block(lesson: Lesson, training: AffineTraining) -> dict[tuple[str, ...], Transform]:
    affine = _start(lesson, training.seed)
    if not affine:
        return {}
    edits = _edits(lesson, affine)
    parameters = [parameter for module in affine.values() for parameter in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=training.rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.factor)
    for batch in training.batches(lesson.inputs.shape[0]):
        inputs, targets = (
            torch.cat([stream[slice(number, number + 1)] for number in batch])
            for stream in (lesson.inputs, lesson.targets)
        )
        with torch.enable_grad():
            with fast_products():
                outputs = lesson.block(inputs, lesson.context, edits)
            error = (outputs - targets).square().sum(-1) / targets.square().sum(-1)
            optimizer.zero_grad()
            error.mean().backward()
        optimizer.step()
        schedule.step()
    return {group: module.transform() for group, module in affine.items()}


def _start(lesson: Lesson, seed: int) -> dict[tuple[str, ...], KroneckerAffine]:
    """Return the transforms of a block as training begins, with scales from the largest magnitudes."""
    plan = {site.site: site for site in lesson.network.plan}
    groups = [group for group in lesson.block.groups if all(plan[site].activations.enabled for site in group)]
    with torch.no_grad():
        x = lesson.inputs[slice(0, 1)]
        names = [lesson.block.input_of[group[0]] for group in groups]
        seen = lesson.block.run(lesson.block.begin(x, lesson.context), names)
    return {
        group: KroneckerAffine(_scale(seen[name], [lesson.block.weights[site] for site in group]), seed)
        for group, name in zip(groups, names, strict=True)
    }


def _scale(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return c = w^(1-α) / x^α of FlatQuant, from largest magnitudes, relative to its own mean."""
    largest = x.abs().flatten(0, -2).amax(0).clamp_min(SMALLEST)
    widest = torch.stack([weight.abs().amax(1) for weight in weights]).amax(0).clamp_min(SMALLEST)
    scale = widest ** (1 - SMOOTHING) / largest**SMOOTHING
    return scale / scale.mean()


def _edits(lesson: Lesson, affine: Mapping[tuple[str, ...], KroneckerAffine]) -> Edits:
    """Return the block's quantizers, each behind its transform."""
    rounding, own = quantizers(lesson.network, lesson.block.block)
    inputs: dict[str, Edit] = dict(own.inputs)
    weights: dict[str, Edit] = dict(rounding)
    for group, module in affine.items():
        shared: dict[int, Edit] = {}
        for site in group:
            quantizer = inputs[site]
            inputs[site] = shared.setdefault(id(quantizer), _then(module, quantizer))
            after = weights.get(site)
            weights[site] = module.into_weight if after is None else _then(module.into_weight, after)
    return Edits(inputs, weights, own.attention)


def _then(first: Edit, second: Edit) -> Edit:
    return lambda x: second(first(x))
