"""Training rotations: over the whole network, or block by block where only one block fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from rotexport.blocks.calibration import Network
from rotexport.blocks.split import BlockGraph, Split, split_blocks
from rotexport.blocks.stream import Stream
from rotexport.blocks.torch_block import Edits, TorchBlock
from rotexport.errors import RecipeError
from rotexport.graph.weights import Array
from rotexport.learning.cayley import CayleySGD, nearest_orthogonal
from rotexport.learning.distill import divergence
from rotexport.learning.precision import fast_products
from rotexport.learning.rotations import Rotations, quantizers
from rotexport.learning.training import Advance, cosine, draw

LOSSES: Final = ("block", "network")
STEPS_PER_VISIT: Final = 4  # of one block, which is read anew for every visit


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
        for key in ("steps", "batch", "windows", "seed"):
            value = getattr(self, key)
            least = 0 if key in ("steps", "seed") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RecipeError(f"{key}: {value!r} is not an integer of at least {least}")
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


@dataclass(frozen=True, eq=False)
class Problem:
    """A network, its blocks and windows, and the rotations that are learned for it."""

    network: Network
    split: Split
    windows: Sequence[Array]
    rotations: Rotations
    context: Mapping[str, Tensor]


Loss = Callable[[int], Tensor]  # of a step


def learn_rotations(
    problem: Problem, training: RotationTraining, folder: Path, advance: Advance = lambda done, of: None
) -> list[float]:
    """Train a problem's rotations in place; return the loss at every step. Streams are kept in `folder`."""
    make = _network_loss if training.loss == "network" else _block_loss
    parameters = list(problem.rotations.parameters())
    optimizer = CayleySGD(parameters, training.rate, training.momentum)
    loss_at = make(problem, training, folder)
    losses = []
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate * cosine(step, training.steps)
        with torch.enable_grad():
            loss = loss_at(step)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
        advance(step + 1, training.steps)
    return losses


def make_problem(network: Network, windows: Array, which: tuple[bool, bool], count: int) -> Problem:
    """Prepare to learn R1, R2 or both (`which`) on the first `count` windows."""
    split = split_blocks(network.graph)
    chosen = list(windows[:count])
    rotations = Rotations(network, *which)
    return Problem(network, split, chosen, rotations, split.context(windows.shape[1]))


def learned_matrices(rotations: Rotations) -> dict[str, Array]:
    """Return float64 matrices under SpinQuant's keys: `R1`, `model.layers.{i}.self_attn.R2`."""
    named = {"R1": rotations.r1} if rotations.r1 is not None else {}
    named |= {r2_key(int(block)): rotation for block, rotation in rotations.r2.items()}
    return {key: nearest_orthogonal(rotation.detach().double()).numpy() for key, rotation in named.items()}


def r2_key(block: int) -> str:
    """Return the key of a block's R2 in SpinQuant's file."""
    return f"model.layers.{block}.self_attn.R2"


def _network_loss(problem: Problem, training: RotationTraining, folder: Path) -> Loss:
    blocks = [TorchBlock(block) for block in problem.split.blocks]
    batches = _batches(problem, training)

    def logits(windows: Sequence[Array], rotated: bool) -> Tensor:
        x = torch.cat([problem.split.embed(window) for window in windows])
        if not rotated:
            for block in blocks:
                x = block(x, problem.context)
            return problem.split.logits(x)
        x = problem.rotations.into(x)
        for block in blocks:
            x = _rotated_block(problem, block, x)
        return problem.split.logits(problem.rotations.out_of(x))

    def loss(step: int) -> Tensor:
        windows = [problem.windows[index] for index in next(batches)]
        with fast_products():
            with torch.no_grad():
                target = logits(windows, rotated=False)
            return divergence(target, logits(windows, rotated=True))

    return loss


def _block_loss(problem: Problem, training: RotationTraining, folder: Path) -> Loss:
    streams = _float_streams(problem, folder)
    batches = _batches(problem, training)
    visits = draw(len(problem.split.blocks), training.steps, 1, training.seed)
    visited: list[tuple[int, TorchBlock]] = []

    def loss(step: int) -> Tensor:
        if step % STEPS_PER_VISIT == 0:
            visited.clear()
            index = next(visits)[0]
            visited.append((index, TorchBlock(problem.split.blocks[index])))
        index, block = visited[0]
        batch = next(batches)
        inputs, targets = (_windows(streams[place], batch) for place in (index, index + 1))
        with fast_products():
            outputs = _rotated_block(problem, block, problem.rotations.into(inputs))
            outputs = problem.rotations.out_of(outputs)
        error = (outputs - targets).square().sum(-1) / targets.square().sum(-1)
        mean: Tensor = error.mean()
        return mean

    return loss


def _rotated_block(problem: Problem, block: TorchBlock, x: Tensor) -> Tensor:
    """Return the output of a quantized block in the rotated basis, for its input there."""
    weights, edits = quantizers(problem.network, block.block)
    edits = Edits(edits.inputs, problem.rotations.weight_edits(block.block, weights), edits.attention)
    given = {**block.begin(x, problem.context), **problem.rotations.constants(block)}
    return block.run(given, [block.block.output], edits)[block.block.output]


def _float_streams(problem: Problem, folder: Path) -> list[Stream]:
    """Run the float network over the windows; keep what passes between blocks."""
    length = len(problem.windows[0])
    first = problem.split.embed(problem.windows[0])
    shape = (len(problem.windows), length, first.shape[-1])
    folder.mkdir(parents=True, exist_ok=True)
    streams = [
        Stream(folder / f"rotations-{place}.stream", shape) for place in range(len(problem.split.blocks) + 1)
    ]
    with torch.no_grad():
        for index, window in enumerate(problem.windows):
            streams[0][slice(index, index + 1)] = problem.split.embed(window)
        for block in problem.split.blocks:
            _through(TorchBlock(block), block, streams, problem.context)
    return streams


def _through(
    block: TorchBlock, graph: BlockGraph, streams: list[Stream], context: Mapping[str, Tensor]
) -> None:
    before, after = streams[graph.index], streams[graph.index + 1]
    for windows in before.batches():
        after[windows] = block(before[windows], context)


def _batches(problem: Problem, training: RotationTraining) -> Iterator[list[int]]:
    return draw(len(problem.windows), training.steps, training.batch, training.seed)


def _windows(stream: Stream, numbers: Sequence[int]) -> Tensor:
    return torch.cat([stream[slice(number, number + 1)] for number in numbers])
