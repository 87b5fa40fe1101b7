"""Evaluating graph nodes in PyTorch, from any tensors to any tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from rotexport.blocks.operators import OPERATORS
from rotexport.errors import GraphError
from rotexport.graph.weights import weight_of


class Evaluator:
    """Runs topologically sorted nodes; constants are read once, floats as float32.

    Raises:
        GraphError: there is an operator that PyTorch has no counterpart of here.

    """

    def __init__(self, nodes: Sequence[gs.Node]) -> None:
        unknown = next((node for node in nodes if node.op not in OPERATORS), None)
        if unknown is not None:
            raise GraphError(f"operator {unknown.op} of node '{unknown.name}' cannot be evaluated in PyTorch")
        self.nodes = tuple(nodes)
        self.constants = {
            tensor.name: _tensor(tensor)
            for node in nodes
            for tensor in node.inputs
            if isinstance(tensor, gs.Constant)
        }

    def run(
        self,
        given: Mapping[str, Tensor],
        wanted: Iterable[str],
        rewrite: Callable[[gs.Node, list[Tensor]], None] = lambda node, inputs: None,
    ) -> dict[str, Tensor]:
        """Return the `wanted` tensors, evaluating only what they need beyond those `given`.

        `rewrite` may replace a node's inputs in place before it runs.
        """
        names = list(wanted)
        values = dict(given)
        steps = self._steps(values, names)
        reads = _last_reads(steps)
        for place, node in enumerate(steps):
            inputs = [self._value(values, tensor) for tensor in node.inputs if not tensor.is_empty()]
            rewrite(node, inputs)
            result = OPERATORS[node.op](inputs, node.attrs)
            outputs = result if isinstance(result, tuple) else (result,)
            values.update((out.name, value) for out, value in zip(node.outputs, outputs, strict=False))
            for name in reads.get(place, ()):
                if name not in names:
                    values.pop(name, None)
        return {name: values[name] for name in names}

    def _steps(self, known: Mapping[str, Tensor], wanted: Sequence[str]) -> list[gs.Node]:
        needed = set(wanted) - known.keys()
        steps = []
        for node in reversed(self.nodes):
            if any(tensor.name in needed for tensor in node.outputs):
                steps.append(node)
                needed |= {tensor.name for tensor in node.inputs} - known.keys()
        return steps[::-1]

    def _value(self, values: Mapping[str, Tensor], tensor: gs.Variable | gs.Constant) -> Tensor:
        value = values.get(tensor.name)
        value = self.constants.get(tensor.name) if value is None else value
        if value is None:
            raise GraphError(f"'{tensor.name}' is neither given nor computed by an earlier node")
        return value


def _last_reads(steps: Sequence[gs.Node]) -> dict[int, list[str]]:
    """Return which tensors are read for the last time by each step."""
    last = {tensor.name: place for place, node in enumerate(steps) for tensor in node.inputs}
    reads: dict[int, list[str]] = {}
    for name, place in last.items():
        reads.setdefault(place, []).append(name)
    return reads


def _tensor(constant: gs.Constant) -> Tensor:
    values: np.ndarray[Any, Any] = np.ascontiguousarray(weight_of(constant).read())
    if values.dtype.kind == "f" and values.dtype != np.float64:
        values = values.astype(np.float32, copy=False)
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    return tensor.reshape(constant.shape)
