"""A decoder graph as a sequence of blocks, cut where dataflow passes through the residual stream."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from rotexport.blocks.evaluate import Evaluator
from rotexport.errors import GraphError
from rotexport.graph.edit import producer
from rotexport.graph.sites import Linear, linears, output_head
from rotexport.graph.weights import Array

_OUTPUT: Final = re.compile(r"block\.(\d+)\.output")


@dataclass(frozen=True, eq=False)
class BlockGraph:
    """One block: the nodes, in order, between two points of the residual stream [batch, tokens, width].

    `context` names the tensors that it reads and that do not derive from its input: masks, angles, empty
    caches.
    """

    index: int
    input: str
    output: str
    nodes: tuple[gs.Node, ...]
    sites: tuple[Linear, ...]
    context: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Split:
    """A decoder's blocks, and what all of them share."""

    graph: gs.Graph
    blocks: tuple[BlockGraph, ...]

    def embed(self, window: Array) -> Tensor:
        """Return what enters the first block, [1, tokens, width], for token ids [tokens]."""
        first = self.blocks[0].input
        with torch.no_grad():
            return self._prologue.run(_feeds(self.graph, window), [first])[first]

    def context(self, length: int) -> dict[str, Tensor]:
        """Return the tensors that blocks read besides the stream, for whole windows of `length` tokens.

        They have batch 1, or none, and do not depend on which tokens they are.
        """
        names = {name for block in self.blocks for name in block.context}
        with torch.no_grad():
            feeds = _feeds(self.graph, np.zeros(length, np.int64))
            return feeds | self._prologue.run(feeds, sorted(names - feeds.keys()))

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [batch, tokens, vocabulary] of what leaves the last block; autograd flows."""
        return self._epilogue.run({self.blocks[-1].output: x}, ["logits"])["logits"]

    def head_inputs(self, x: Tensor) -> Tensor:
        """Return what the output head multiplies, [batch, tokens, K], of what leaves the last block."""
        name = self._head.input.name
        return self._to_head.run({self.blocks[-1].output: x}, [name])[name]

    @cached_property
    def _head(self) -> Linear:
        return output_head(self.graph)

    @cached_property
    def _to_head(self) -> Evaluator:
        tensors = self.graph.tensors()
        return Evaluator(_ancestors([self._head.input], self.graph, tensors[self.blocks[-1].output]))

    @cached_property
    def _epilogue(self) -> Evaluator:
        tensors = self.graph.tensors()
        return Evaluator(_ancestors([tensors["logits"]], self.graph, tensors[self.blocks[-1].output]))

    @cached_property
    def _prologue(self) -> Evaluator:
        wanted = {self.blocks[0].input, *(name for block in self.blocks for name in block.context)}
        tensors = self.graph.tensors()
        return Evaluator(_ancestors([tensors[name] for name in sorted(wanted)], self.graph))


def split_blocks(graph: gs.Graph) -> Split:
    """Cut a topologically sorted float decoder graph into its blocks; `graph` is not changed.

    Raises:
        GraphError: the graph has no residual stream by the names the exporter gives, or a block reads
            something of an earlier block besides it.

    """
    tensors = graph.tensors()
    numbered = sorted((int(match[1]), name) for name in tensors if (match := _OUTPUT.fullmatch(name)))
    if not numbered or "block.0.input" not in tensors:
        raise GraphError("the graph has no tensors 'block.0.input' and 'block.N.output': export it again")
    sites = linears(graph)
    blocks, stream = [], tensors["block.0.input"]
    token_dependent = {id(node) for node in _descendants(graph, graph.inputs[0], shapes=False)}
    for index, name in numbered:
        block = _block(graph, index, stream, tensors[name], sites)
        _check(block, graph, token_dependent)
        blocks.append(block)
        stream = tensors[name]
    return Split(graph, tuple(blocks))


def _block(
    graph: gs.Graph, index: int, first: gs.Variable, last: gs.Variable, sites: Iterable[Linear]
) -> BlockGraph:
    below = {id(node) for node in _descendants(graph, first, shapes=True)}
    nodes = [node for node in _ancestors([last], graph, first) if id(node) in below]
    inside = {id(node) for node in nodes}
    written = {id(tensor) for node in nodes for tensor in node.outputs} | {id(first)}
    context = {
        tensor.name: None
        for node in nodes
        for tensor in node.inputs
        if isinstance(tensor, gs.Variable) and id(tensor) not in written and not tensor.is_empty()
    }
    own = tuple(site for site in sites if id(site.node) in inside)
    return BlockGraph(index, first.name, last.name, tuple(nodes), own, tuple(context))


def _check(block: BlockGraph, graph: gs.Graph, token_dependent: set[int]) -> None:
    tensors = graph.tensors()
    for name in block.context:
        writer = producer(tensors[name])
        if writer is not None and id(writer) in token_dependent:
            raise GraphError(
                f"block {block.index} reads '{name}', which depends on the tokens but not through "
                f"'{block.input}' alone: such blocks cannot be calibrated one by one"
            )


def _descendants(graph: gs.Graph, start: gs.Variable, shapes: bool) -> Iterator[gs.Node]:
    """Yield the nodes that read something derived from `start`; with `shapes`, a shape is derived, too."""
    known = {id(start)}
    for node in graph.nodes:
        if (shapes or node.op != "Shape") and any(id(tensor) in known for tensor in node.inputs):
            known |= {id(tensor) for tensor in node.outputs}
            yield node


def _ancestors(
    ends: Iterable[gs.Variable], graph: gs.Graph, stop: gs.Variable | None = None
) -> list[gs.Node]:
    """Return the nodes that `ends` depend on, in graph order, not looking beyond `stop`."""
    needed = {id(tensor) for tensor in ends}
    found = []
    for node in reversed(graph.nodes):
        if any(id(tensor) in needed and tensor is not stop for tensor in node.outputs):
            found.append(node)
            needed |= {id(tensor) for tensor in node.inputs}
    return found[::-1]


def _feeds(graph: gs.Graph, window: Array) -> dict[str, Tensor]:
    """Return the graph's inputs for one window of token ids [S], with an empty cache."""
    length = len(window)
    feeds = {}
    for port in graph.inputs:
        if port.name == "input_ids":
            feeds[port.name] = torch.from_numpy(np.ascontiguousarray(window, np.int64))[None]
        elif port.name == "attention_mask":
            feeds[port.name] = torch.ones(1, length, dtype=torch.int64)
        elif port.name == "position_ids":
            feeds[port.name] = torch.arange(length)[None]
        elif port.name.startswith("past_key_values."):
            feeds[port.name] = torch.zeros(1, port.shape[1], 0, port.shape[3])
    return feeds
