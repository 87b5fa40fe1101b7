"""Training rotations: over the whole network, or block by block where only one block fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from rotexport.blocks.calibration import Network, claim, run_digest
from rotexport.blocks.split import BlockGraph, Split, split_blocks
from rotexport.blocks.stream import Stream
from rotexport.blocks.torch_block import Edits, TorchBlock
from rotexport.graph.weights import Array
from rotexport.learning.cayley import CayleySGD, nearest_orthogonal
from rotexport.learning.distill import divergence
from rotexport.learning.precision import fast_products
from rotexport.learning.rotations import Rotations, quantizers
from rotexport.learning.training import Advance, RotationTraining, cosine, draw
from rotexport.transforms.transform import OrthogonalMatrix, Transform

STEPS_PER_VISIT: Final = 4  # of one block, which is read anew for every visit; then all is saved
WHOLE: Final = "streams.whole"  # tells that no stream is half written


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
    """Train a problem's rotations in place; return the loss at every step.

    Streams and what was learned so far are kept in `folder`; a run that stopped there continues.
    """
    make = _network_loss if training.loss == "network" else _block_loss
    parameters = list(problem.rotations.parameters())
    optimizer = CayleySGD(parameters, training.rate, training.momentum)
    folder.mkdir(parents=True, exist_ok=True)
    progress = _Progress(folder / "learned.pt", optimizer, parameters)
    losses = progress.load()
    start = len(losses)
    loss_at = make(problem, training, folder, start) if start < training.steps else None
    for step in range(start, training.steps):
        assert loss_at is not None
        for group in optimizer.param_groups:
            group["lr"] = training.rate * cosine(step, training.steps)
        with torch.enable_grad():
            loss = loss_at(step)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % STEPS_PER_VISIT == 0 or step + 1 == training.steps:
            progress.save(losses)
        advance(step + 1, training.steps)
    for path in (*folder.glob("*.stream"), *folder.glob(WHOLE)):
        path.unlink()
    return losses


class _Progress:
    """What was learned so far, in one file that is replaced whole: points and velocities in float64."""

    def __init__(self, path: Path, optimizer: CayleySGD, parameters: Sequence[nn.Parameter]) -> None:
        self.path, self._optimizer, self._parameters = path, optimizer, parameters

    def load(self) -> list[float]:
        """Continue where an earlier run saved; return the losses of the steps it had done."""
        if not self.path.exists():
            return []
        kept = torch.load(self.path, weights_only=True)
        with torch.no_grad():
            for parameter, state in zip(self._parameters, kept["states"], strict=True):
                self._optimizer.state[parameter].update(state)
                if state:
                    parameter.copy_(state["point"])
        return list(kept["losses"])

    def save(self, losses: Sequence[float]) -> None:
        states = [dict(self._optimizer.state[parameter]) for parameter in self._parameters]
        partial = self.path.with_suffix(".partial")
        torch.save({"states": states, "losses": list(losses)}, partial)
        partial.rename(self.path)


@dataclass(frozen=True)
class Learned:
    """Matrices by block, R1's under None, and the loss at every step."""

    matrices: dict[int | None, Transform]
    losses: list[float]

    @property
    def note(self) -> str:
        """What a reader of the report should know."""
        ends = max(1, len(self.losses) // 10)
        first, last = (sum(part) / ends for part in (self.losses[:ends], self.losses[-ends:]))
        return f"rotations learned for {len(self.losses)} steps: loss {first:.4g} to {last:.4g}"


def spin(network: Network, windows: Array, folder: Path, advance: Advance) -> Learned:
    """Learn the rotations that a network's recipe wants learned, on the first of some windows [W, S].

    What is returned acts on top of the rotations that the graph has already. `folder` is as in
    `learn_rotations`.

    Raises:
        OutputError: `folder` holds another run.

    """
    recipe = network.recipe
    plan = [replace(site, activations=replace(site.activations, mode="dynamic")) for site in network.plan]
    network = replace(network, plan=plan)  # a range is not calibrated before the rotation is known
    split, training = split_blocks(network.graph), recipe.learn_rotations
    kinds = (recipe.rotations.r1.kind, recipe.rotations.r2.kind)
    rotations = Rotations(network, *(kind == "learned" for kind in kinds))
    chosen = list(windows[: training.windows])
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, run_digest(network, training, windows[: training.windows]))
    problem = Problem(network, split, chosen, rotations, split.context(windows.shape[1]))
    losses = learn_rotations(problem, training, folder, advance)
    return Learned(learned_matrices(rotations), losses)


def learned_matrices(rotations: Rotations) -> dict[int | None, Transform]:
    """Return what was learned: R2 by block, R1 under None."""
    named: dict[int | None, Tensor] = {} if rotations.r1 is None else {None: rotations.r1}
    named |= {int(block): rotation for block, rotation in rotations.r2.items()}
    return {
        block: OrthogonalMatrix(nearest_orthogonal(rotation.detach().double()).numpy())
        for block, rotation in named.items()
    }


def _network_loss(problem: Problem, training: RotationTraining, folder: Path, start: int) -> Loss:
    blocks = [TorchBlock(block) for block in problem.split.blocks]
    batches = _batches(problem, training, start)

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


def _block_loss(problem: Problem, training: RotationTraining, folder: Path, start: int) -> Loss:
    streams = _float_streams(problem, folder)
    batches = _batches(problem, training, start)
    visits = islice(
        draw(len(problem.split.blocks), training.steps, 1, training.seed), start // STEPS_PER_VISIT, None
    )
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
    """Run the float network over the windows, unless an earlier run did; keep what passes between blocks."""
    length = len(problem.windows[0])
    first = problem.split.embed(problem.windows[0])
    shape = (len(problem.windows), length, first.shape[-1])
    streams = [
        Stream(folder / f"rotations-{place}.stream", shape) for place in range(len(problem.split.blocks) + 1)
    ]
    whole = folder / WHOLE
    if whole.exists():
        return streams
    with torch.no_grad():
        for index, window in enumerate(problem.windows):
            streams[0][slice(index, index + 1)] = problem.split.embed(window)
        for block in problem.split.blocks:
            _through(TorchBlock(block), block, streams, problem.context)
    for stream in streams:
        stream.flush()
    whole.touch()
    return streams


def _through(
    block: TorchBlock, graph: BlockGraph, streams: list[Stream], context: Mapping[str, Tensor]
) -> None:
    before, after = streams[graph.index], streams[graph.index + 1]
    for windows in before.batches():
        after[windows] = block(before[windows], context)


def _batches(problem: Problem, training: RotationTraining, start: int) -> Iterator[list[int]]:
    return islice(draw(len(problem.windows), training.steps, training.batch, training.seed), start, None)


def _windows(stream: Stream, numbers: Sequence[int]) -> Tensor:
    return torch.cat([stream[slice(number, number + 1)] for number in numbers])
