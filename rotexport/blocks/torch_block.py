"""One decoder block as a differentiable PyTorch function, open at every linear and at the attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import onnx_graphsurgeon as gs
from torch import Tensor

from rotexport.blocks.evaluate import Evaluator
from rotexport.blocks.split import BlockGraph

Edit: TypeAlias = Callable[[Tensor], Tensor]
ATTENTION_INPUTS: Final = ("query", "key", "value")


@dataclass(frozen=True)
class Edits:
    """What happens on the way into each product of a block.

    `inputs[site]` maps the activation [..., K] that a site's MatMul reads; the same object on several sites
    that share a tensor runs once. `weights[site]` maps its weight [K, N]. `attention` maps "query", "key" or
    "value" [batch, heads, tokens, head size] as the attention reads them, after RoPE and rotations.
    """

    inputs: Mapping[str, Edit] = field(default_factory=dict)
    weights: Mapping[str, Edit] = field(default_factory=dict)
    attention: Mapping[str, Edit] = field(default_factory=dict)


NO_EDITS: Final = Edits()


class TorchBlock:
    """A block with its weights in memory, as float32.

    `weights[site]` is [K, N] and may be replaced; `constants` are all, by name; `input_of[site]` names the
    tensor that the site reads, `role_of[site]` says what it is for; `groups` are the sites that share an
    input, in order of evaluation.
    """

    def __init__(self, block: BlockGraph) -> None:
        self.block = block
        self._evaluator = Evaluator(block.nodes)
        self._site_of = {id(site.node): site.name for site in block.sites}
        self.constants = self._evaluator.constants
        self.input_of = {site.name: site.input.name for site in block.sites}
        self.role_of = {site.name: site.role for site in block.sites}
        self.weights = {site.name: self._evaluator.constants[site.weight.name] for site in block.sites}
        shared: dict[str, list[str]] = {}
        for site in block.sites:
            shared.setdefault(site.input.name, []).append(site.name)
        self.groups = tuple(tuple(names) for names in shared.values())

    def __call__(self, x: Tensor, context: Mapping[str, Tensor], edits: Edits = NO_EDITS) -> Tensor:
        """Return the block's output [B, S, width] for its input [B, S, width]."""
        given = {**self._context(context, len(x)), self.block.input: x}
        return self.run(given, [self.block.output], edits)[self.block.output]

    def run(
        self, given: Mapping[str, Tensor], wanted: Iterable[str], edits: Edits = NO_EDITS
    ) -> dict[str, Tensor]:
        """Return the named tensors, from those given (the block's input, its context, or inner ones)."""
        edited: dict[tuple[str, int], Tensor] = {}

        def rewrite(node: gs.Node, inputs: list[Tensor]) -> None:
            site = self._site_of.get(id(node))
            if site is not None:
                inputs[:] = [self._input(site, inputs[0], edits, edited), self._weight(site, edits)]
            elif node.op == "Attention":
                for place, name in enumerate(ATTENTION_INPUTS):
                    if name in edits.attention:
                        inputs[place] = edits.attention[name](inputs[place])

        return self._evaluator.run(given, wanted, rewrite)

    def sum_of(self, site: str) -> str | None:
        """Return the sum, of all that is added, that a site's product enters as it is; None: it enters none.

        In a block whose attention and MLP run in parallel, it is the same for both.
        """
        inside = {id(node) for node in self.block.nodes}
        value = next(linear.node for linear in self.block.sites if linear.name == site).outputs[0]
        found = None
        while len(value.outputs) == 1 and value.outputs[0].op == "Add" and id(value.outputs[0]) in inside:
            added = value.outputs[0]
            value = added.outputs[0]
            if not any(isinstance(tensor, gs.Constant) for tensor in added.inputs):
                found = value.name
        return found

    def begin(self, x: Tensor, context: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what `advance` starts from."""
        return {**self._context(context, len(x)), self.block.input: x}

    def advance(self, values: dict[str, Tensor], until: str, edits: Edits = NO_EDITS) -> None:
        """Evaluate in place up to the tensor `until`, keeping only what later nodes can still read."""
        wanted = {until, *(name for name in values if name in self._read_after(until))}
        frontier = self._frontier(until) - self._evaluator.constants.keys()
        result = self.run(values, wanted | frontier, edits)
        values.clear()
        values.update(result)

    def _frontier(self, until: str) -> set[str]:
        """Return the tensors written before `until` that are read after it."""
        place = self._place(until)
        before = {tensor.name for node in self.block.nodes[: place + 1] for tensor in node.outputs}
        return before & self._read_after(until)

    def _read_after(self, until: str) -> set[str]:
        later = self.block.nodes[self._place(until) + 1 :]
        return {tensor.name for node in later for tensor in node.inputs}

    def _place(self, tensor: str) -> int:
        """Return the position of the node that writes a tensor; -1 for the block's input."""
        writers = {out.name: place for place, node in enumerate(self.block.nodes) for out in node.outputs}
        return writers.get(tensor, -1)

    def _context(self, context: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        """Give empty caches, which are concatenated to, the batch of the stream; the rest broadcasts."""
        return {
            name: value.expand(batch, *value.shape[1:]) if value.ndim == 4 and 0 in value.shape else value
            for name in self.block.context
            if (value := context[name]) is not None
        }

    def _weight(self, site: str, edits: Edits) -> Tensor:
        weight = self.weights[site]
        return edits.weights[site](weight) if site in edits.weights else weight

    def _input(self, site: str, x: Tensor, edits: Edits, edited: dict[tuple[str, int], Tensor]) -> Tensor:
        edit = edits.inputs.get(site)
        if edit is None:
            return x
        key = (self.input_of[site], id(edit))
        if key not in edited:
            edited[key] = edit(x)
        return edited[key]
