"""Choosing weights block by block: one block of weights and activations in memory, the stream on disk.

Two streams of calibration activations pass through the network: the float one, and that of the network as
it will be exported, with its weights and activations quantized up to the present block. A method sees both at
every block. What it chose, and both streams behind it, are on disk before the next block begins, so that a
run that was interrupted continues there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from rotexport.blocks.fake_quant import CacheQuantizer, DynamicQuantizer, StaticQuantizer
from rotexport.blocks.split import BlockGraph, Split, split_blocks
from rotexport.blocks.stream import Stream
from rotexport.blocks.torch_block import Edit, Edits, TorchBlock
from rotexport.errors import OutputError
from rotexport.graph.sites import linears
from rotexport.graph.weights import Array, weight_of
from rotexport.passes.quantize_weights import quantizer_of
from rotexport.quant.calibrate import InputStatistics
from rotexport.quant.formats import activation_format, weight_format
from rotexport.quant.plan import SitePlan
from rotexport.quant.scales import QuantizedTensor, WeightQuantizer
from rotexport.quant.scheme import group_size
from rotexport.quant.solved import SolvedWeight, dequantized, save_solved
from rotexport.recipe import Recipe

Advance = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class BlockTask:
    """One block to quantize.

    `float_inputs` and `inputs` are what enters it in the float and in the quantized network, `targets`
    and `outputs` what leaves it there, each a `Stream`. `edits` hold the quantizers of activations and cache
    that the exported graph has; `plan` the block's sites.
    """

    block: TorchBlock
    context: Mapping[str, Tensor]
    float_inputs: Stream
    inputs: Stream
    targets: Stream
    outputs: Stream
    plan: Mapping[str, SitePlan]
    edits: Edits


class BlockMethod(Protocol):
    """A way to choose the codes of a block."""

    def solve(self, task: BlockTask) -> tuple[dict[str, QuantizedTensor], dict[str, dict[str, float]]]:
        """Return the quantized weights of sites, and of each the relative loss after each step.

        Fills `task.targets` and `task.outputs`; may leave anything in `task.block.weights`.
        """


@dataclass(frozen=True, eq=False)
class Network:
    """A float decoder graph and how it will be quantized."""

    graph: gs.Graph
    plan: Sequence[SitePlan]
    statistics: Mapping[str, InputStatistics]
    recipe: Recipe

    def edits(self, block: BlockGraph) -> Edits:
        """Return the activation and cache quantizers of a block."""
        planned = {site.site: site for site in self.plan}
        inputs: dict[str, Edit] = {}
        shared: dict[object, Edit] = {}
        for site in block.sites:
            quantizer = self.activation_quantizer(planned[site.name])
            if quantizer is not None:
                inputs[site.name] = shared.setdefault((site.input.name, quantizer), quantizer)
        return Edits(inputs, {}, self._attention(block))

    def activation_quantizer(self, site: SitePlan) -> Edit | None:
        """Return what quantizes a site's input; None where nothing does."""
        scheme = site.activations
        if not scheme.enabled:
            return None
        number_format = activation_format(scheme.format, scheme.symmetric)
        if scheme.mode == "dynamic":
            return DynamicQuantizer(number_format, scheme.clip, site.activation_group)
        return StaticQuantizer(number_format, self.statistics[site.site].static_scale(scheme))

    def _attention(self, block: BlockGraph) -> dict[str, Edit]:
        sizes = [int(node.inputs[1].shape[-1]) for node in block.nodes if node.op == "Attention"]
        if self.recipe.attention.streaming:
            return {}  # its caches are the operator's; the linears are calibrated behind a float one
        cache = self.recipe.kv_cache
        formats = {"key": cache.key, "value": cache.value}
        return {
            name: CacheQuantizer(
                number_format,
                group_size(cache.group, sizes[0], "kv_cache.group", "a head"),
                cache.clip,
            )
            for name, number_format in formats.items()
            if number_format != "none" and sizes
        }


@dataclass(frozen=True)
class BlockResult:
    """How far a block's output is from the float network's: relative root mean square, over all windows.

    `sites` holds, by site, the relative loss of its product after each step.
    """

    block: int
    error: float
    sites: dict[str, dict[str, float]]


@dataclass(frozen=True, eq=False)
class Behind:
    """What leaves the last block over some windows [W, S]: in the float network, and in the quantized one."""

    windows: Array
    exact: Iterable[Tensor]
    quantized: Iterable[Tensor]


@dataclass(frozen=True, eq=False)
class SolvedBlocks:
    """Quantized weights by site, what they cost by block, and the streams `behind`, if in files yet."""

    weights: dict[str, WeightQuantizer]
    results: list[BlockResult]
    behind: Behind | None


def solve_blocks(
    network: Network, method: BlockMethod, windows: Array, folder: Path, advance: Advance
) -> SolvedBlocks:
    """Choose the weights of every planned site inside blocks.

    Args:
        network: what to quantize; its graph is not changed.
        method: how.
        windows: calibration token ids [W, S].
        folder: where streams and results are kept; a run of the same network that stopped there continues.
        advance: told (blocks done, blocks in all).

    Raises:
        OutputError: `folder` holds another run.

    """
    split = split_blocks(network.graph)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, run_digest(network, method, windows))
    runner = _Runner(network, split, method, windows, folder)
    results = []
    with torch.no_grad():
        for number, block in enumerate(split.blocks):
            results.append(runner.solve(block))
            advance(number + 1, len(split.blocks))
    return SolvedBlocks(runner.solved, results, runner.behind())


def run_blocks(
    network: Network,
    solved: Mapping[str, WeightQuantizer],
    windows: Array,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> Behind:
    """Run both networks, the quantized one with weights as `solved`, by site, or rounded.

    Args:
        network: what is quantized, and how; its graph is not changed.
        solved: quantizers of weights by site.
        windows: calibration token ids [W, S]; both networks' streams over all of them are in memory.
        advance: told (blocks done, blocks in all).

    """
    split = split_blocks(network.graph)
    context = split.context(windows.shape[1])
    exact = [split.embed(window) for window in windows]
    inexact = list(exact)
    with torch.no_grad():
        for number, graph in enumerate(split.blocks):
            block, edits = TorchBlock(graph), network.edits(graph)
            exact = [block(x, context) for x in exact]
            block.weights |= quantized_weights(network, solved, block)
            inexact = [block(x, context, edits) for x in inexact]
            advance(number + 1, len(split.blocks))
    return Behind(windows, exact, inexact)


class _Runner:
    """Goes from block to block; everything that is needed to go on lies in `folder`."""

    def __init__(
        self, network: Network, split: Split, method: BlockMethod, windows: Array, folder: Path
    ) -> None:
        self.network, self.split, self.method = network, split, method
        self.windows, self.folder = windows, folder
        self.context = split.context(windows.shape[1])
        self.plan = {site.site: site for site in network.plan}
        self.solved: dict[str, WeightQuantizer] = {}
        self.shape = (*windows.shape, int(network.graph.tensors()[split.blocks[0].input].shape[-1]))

    def solve(self, block: BlockGraph) -> BlockResult:
        record = self.folder / f"block-{block.index}.json"
        if not record.is_file():
            self._compute(block, record)
        kept = json.loads(record.read_text())
        for site in kept["sites"]:
            scheme = self.plan[site].weights
            number_format = weight_format(scheme.format, scheme.symmetric)
            group = self.plan[site].weight_group
            self.solved[site] = SolvedWeight(self._weights(block), site, number_format, group)
        return BlockResult(block.index, kept["error"], kept["sites"])

    def _compute(self, block: BlockGraph, record: Path) -> None:
        if block.index == 0:
            self._embed()
        own = {site.name: self.plan[site.name] for site in block.sites}
        task = BlockTask(
            TorchBlock(block),
            self.context,
            self._stream("float", block.index),
            self._stream("quantized", block.index),
            self._stream("float", block.index + 1),
            self._stream("quantized", block.index + 1),
            own,
            self.network.edits(block),
        )
        tensors, figures = self.method.solve(task)
        error = _relative_error(task)
        save_solved(self._weights(block), tensors)
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps({"error": error, "sites": {s: figures.get(s, {}) for s in tensors}}))
        partial.rename(record)
        task.inputs.remove()
        task.float_inputs.remove()

    def _embed(self) -> None:
        streams = [self._stream("float", 0), self._stream("quantized", 0)]
        for index, window in enumerate(self.windows):
            for stream in streams:
                stream[slice(index, index + 1)] = self.split.embed(window)

    def behind(self) -> Behind | None:
        last = self.split.blocks[-1].index + 1
        if not all(self._path(name, last).exists() for name in ("float", "quantized")):
            return None  # new files would hold zeros
        return Behind(self.windows, self._stream("float", last), self._stream("quantized", last))

    def _stream(self, name: str, index: int) -> Stream:
        return Stream(self._path(name, index), self.shape)

    def _path(self, name: str, index: int) -> Path:
        return self.folder / f"{name}-{index}.stream"

    def _weights(self, block: BlockGraph) -> Path:
        return self.folder / f"block-{block.index}.npz"


def chosen_tensors(
    network: Network, solved: Mapping[str, WeightQuantizer], block: TorchBlock
) -> dict[str, QuantizedTensor]:
    """Return codes and scales of a block's planned weights: as `solved`, or as their schemes round them."""
    plan = {site.site: site for site in network.plan if site.weights.enabled}
    return {
        name: (solved.get(name) or quantizer_of(plan[name])).quantize(weight.numpy())
        for name, weight in block.weights.items()
        if name in plan
    }


def quantized_weights(
    network: Network, solved: Mapping[str, WeightQuantizer], block: TorchBlock
) -> dict[str, Tensor]:
    """Return what a block's planned weights [K, N] stand for once they are quantized."""
    tensors = chosen_tensors(network, solved, block)
    return {name: torch.from_numpy(dequantized(tensor)) for name, tensor in tensors.items()}


def run_quantized(task: BlockTask, tensors: Mapping[str, QuantizedTensor]) -> None:
    """Fill a task's outputs with what the block computes with quantized weights, activations and cache."""
    for site, tensor in tensors.items():
        task.block.weights[site] = torch.from_numpy(dequantized(tensor))
    for windows in task.outputs.batches():
        task.outputs[windows] = task.block(task.inputs[windows], task.context, task.edits)


def _relative_error(task: BlockTask) -> float:
    wrong = total = 0.0
    for output, target in zip(task.outputs, task.targets, strict=True):
        wrong += float((output - target).square().sum(dtype=torch.float64))
        total += float(target.square().sum(dtype=torch.float64))
    task.outputs.flush()
    task.targets.flush()
    return (wrong / total) ** 0.5 if total else 0.0


def run_digest(network: Network, method: object, windows: Array) -> str:
    """Tell runs apart by their graph, plan, method and text; weights by what they are computed from."""
    recipe = network.recipe
    described = repr((list(network.plan), recipe.kv_cache, recipe.attention, method)).encode()
    digest = hashlib.sha256(described + np.ascontiguousarray(windows).tobytes())
    for node in network.graph.nodes:
        digest.update(f"{node.op}{sorted(node.attrs)}{[tensor.name for tensor in node.inputs]}".encode())
    for site in linears(network.graph):
        digest.update(repr(weight_of(site.weight)).encode())
    return digest.hexdigest()


def claim(folder: Path, digest: str) -> None:
    """Make `folder` this run's, or see that it is.

    Raises:
        OutputError: it holds another run.

    """
    owner = folder / "run.sha256"
    if owner.exists() and owner.read_text() != digest:
        raise OutputError(
            f"'{folder}' holds a calibration of another model, recipe or text; "
            "delete it or name another folder"
        )
    owner.write_text(digest)
