"""From a traced graph with one block of each type to the graph of the whole model."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.errors import GraphError
from rotexport.export.trace import MARKER
from rotexport.graph.io import OPSET

_SHARED = -1  # owner of what comes before the blocks
_TOKENS = ("input_ids", "attention_mask", "position_ids")
_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(key|value)")


class InseparableBlocksError(GraphError):
    """A block reads the inside of another, so blocks cannot be copied one by one."""


def replicate(traced: gs.Graph, source: tuple[int, ...], layers: str) -> gs.Graph:
    """Assemble the model whose block `n` is a copy of traced block `source[n]`.

    The residual stream is named `block.0.input` and `block.N.output`; nodes are named by block, operator and
    count ("block.3/MatMul_2"). Weights stay inputs of the graph, renamed to their layer.

    Args:
        traced: canonical graph with `Boundary` markers; weights are inputs named as in the state dict.
        source: for every layer of the model, the traced block to copy.
        layers: state-dict prefix of the decoder blocks ("model.layers").

    Raises:
        InseparableBlocksError: a block uses more than the residual stream, shared values and its own cache,
            and the traced graph is not already the whole model.

    """
    weight = re.compile(re.escape(layers) + r"\.(\d+)\.(.*)")
    parts = _split(traced, weight, separable=source != tuple(range(len(source))))
    streams = {node.attrs["index"]: node for node in traced.nodes if node.op == MARKER}
    copy = _Copy(traced, weight)
    copy.nodes(parts[_SHARED], "prologue", None)
    copy.name_stream(streams[-1], "block.0.input")
    for layer, block in enumerate(source):
        copy.enter(streams[block - 1])
        copy.nodes(parts[block], f"block.{layer}", layer)
        copy.name_stream(streams[block], f"block.{layer}.output")
    copy.enter(streams[max(source)])
    copy.nodes(parts[max(source) + 1], "epilogue", None)
    return copy.finish(len(source))


def _split(traced: gs.Graph, weight: re.Pattern[str], separable: bool) -> dict[int, list[gs.Node]]:
    """Assign every node to the last block whose stream, weights or cache it depends on."""
    owner: dict[int, int] = {}
    for tensor in traced.inputs:
        match = _CACHE.fullmatch(tensor.name)
        layer = match[2] if match else (weight.fullmatch(tensor.name) or [None, None])[1]
        owner[id(tensor)] = _SHARED if layer is None else int(layer)
    parts: dict[int, list[gs.Node]] = defaultdict(list)
    for node in traced.nodes:
        if node.op == MARKER:
            owner[id(node.outputs[0])] = node.attrs["index"] + 1
            continue
        owners = {owner.get(id(tensor), _SHARED) for tensor in node.inputs}
        last = max(owners)
        strangers = owners - {last, _SHARED}
        if separable and strangers:
            raise InseparableBlocksError(
                f"block {last} reads values of block {min(strangers)} ('{node.name}')"
            )
        parts[last].append(node)
        owner.update((id(tensor), last) for tensor in node.outputs)
    return parts


class _Copy:
    """The graph being assembled, and what stands in it for each traced tensor at this moment."""

    def __init__(self, traced: gs.Graph, weight: re.Pattern[str]) -> None:
        self.traced = {tensor.name: tensor for tensor in traced.inputs}
        self.weight = weight
        self.weights = {name for name in self.traced if name not in _TOKENS and not _CACHE.fullmatch(name)}
        self.graph = gs.Graph(opset=OPSET, name="model")
        self.current: dict[int, gs.Variable] = {}
        self.stream = gs.Variable("")
        self.inputs: dict[str, gs.Variable] = {}
        self.outputs: dict[str, gs.Variable] = {}
        self.constants: dict[tuple[str, tuple[int, ...], bytes], gs.Constant] = {}
        self.numbers: Counter[str] = Counter()

    def nodes(self, nodes: list[gs.Node], scope: str, layer: int | None) -> None:
        """Append copies of `nodes`, their weights and cache renamed to `layer`."""
        for node in nodes:
            inputs = [self._read(tensor, layer) for tensor in node.inputs]
            name = self._numbered(scope, node)
            outputs = [self._write(tensor, name, k, layer) for k, tensor in enumerate(node.outputs)]
            copy = gs.Node(node.op, name, dict(node.attrs), inputs, outputs, domain=node.domain)
            self.graph.nodes.append(copy)

    def _numbered(self, scope: str, node: gs.Node) -> str:
        # What computes with weights alone will be folded; it must not leave gaps in the numbering.
        folds = all(isinstance(tensor, gs.Constant) or tensor.name in self.weights for tensor in node.inputs)
        name = f"{scope}/weights/{node.op}" if folds else f"{scope}/{node.op}"
        self.numbers[name] += 1
        return f"{name}_{self.numbers[name] - 1}"

    def name_stream(self, marker: gs.Node, name: str) -> None:
        """Give the residual stream at a marker its name, and make it what the next block reads."""
        self.stream = self.current[id(marker.inputs[0])]
        self.stream.name = name

    def enter(self, marker: gs.Node) -> None:
        """Let what follows a marker read the present residual stream."""
        self.current[id(marker.outputs[0])] = self.stream

    def finish(self, layers: int) -> gs.Graph:
        """Declare inputs and outputs in the order of the contract; weights come last."""
        cache = [f"{n}.{kind}" for n in range(layers) for kind in ("key", "value")]
        for name in _TOKENS:
            self.inputs.setdefault(name, self._declare(self.traced[name], name))
        inputs = [
            self.inputs.pop(name) for name in (*_TOKENS, *(f"past_key_values.{name}" for name in cache))
        ]
        self.graph.inputs = [*inputs, *self.inputs.values()]
        self.graph.outputs = [self.outputs["logits"], *(self.outputs[f"present.{name}"] for name in cache)]
        return self.graph

    def _read(self, tensor: gs.Variable | gs.Constant, layer: int | None) -> gs.Variable | gs.Constant:
        if isinstance(tensor, gs.Constant):
            return self._constant(tensor)
        if id(tensor) in self.current:
            return self.current[id(tensor)]
        name = self._renamed(tensor.name, layer)
        if name not in self.inputs:
            self.inputs[name] = self._declare(tensor, name)
        return self.inputs[name]

    def _write(self, tensor: gs.Variable, node: str, index: int, layer: int | None) -> gs.Variable:
        result = _CACHE.fullmatch(tensor.name) or tensor.name == "logits"
        name = self._renamed(tensor.name, layer) if result else f"{node}.{index}" if index else node
        variable = self._declare(tensor, name)
        self.current[id(tensor)] = variable
        if result:
            self.outputs[name] = variable
        return variable

    def _renamed(self, name: str, layer: int | None) -> str:
        if layer is not None and (match := _CACHE.fullmatch(name)):
            return f"{match[1]}.{layer}.{match[3]}"
        if layer is not None and (match := self.weight.fullmatch(name)):
            return f"{name[: match.start(1)]}{layer}.{match[2]}"
        return name

    def _constant(self, tensor: gs.Constant) -> gs.Constant:
        values = np.asarray(tensor.values)
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self.constants:
            buffer = tensor.name.startswith("model.")  # the wrapper's attribute
            name = tensor.name.removeprefix("model.") if buffer else f"constant.{len(self.constants)}"
            self.constants[key] = gs.Constant(name, values)
        return self.constants[key]

    @staticmethod
    def _declare(tensor: gs.Variable, name: str) -> gs.Variable:
        return gs.Variable(name, tensor.dtype, tensor.shape and list(tensor.shape))
