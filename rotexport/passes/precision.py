"""Chooses the float type activations are computed in.

Preserves the function within the rounding of that type. What derives from weights or caches narrows; what
derives from positions alone (rotary angles) stays in float32 up to where activations meet it, because
position times frequency needs its 24 bits. Logits come out in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rotexport.graph.edit import consumers, unused_name
from rotexport.graph.weights import Cast, constant, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves

FLOAT32 = np.dtype(np.float32)


class SetPrecision(Pass):
    """Narrow activations, weights and caches from float32 to `dtype`."""

    name = "set-precision"
    preserves = Preserves.PRECISION

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def run(self, graph: gs.Graph) -> PassReport:
        if self.dtype == FLOAT32:
            return PassReport()
        report = PassReport()
        logits = [tensor for tensor in graph.outputs if tensor.name == "logits"]
        narrow = {id(tensor) for tensor in graph.inputs if _is_float32(tensor)}
        for tensor in graph.inputs:
            if id(tensor) in narrow:
                tensor.dtype = self.dtype
        casts: dict[int, gs.Variable] = {}
        for node in list(graph.nodes):
            if self._computes_activations(node, narrow):
                self._narrow_inputs(graph, node, narrow, casts)
                for tensor in filter(_is_float32, node.outputs):
                    tensor.dtype = self.dtype
                    narrow.add(id(tensor))
                report.changed += 1
        for tensor in logits:
            self._widen(graph, tensor)
        return report

    def _computes_activations(self, node: gs.Node, narrow: set[int]) -> bool:
        if any(id(tensor) in narrow for tensor in node.inputs):
            return True
        return node.op == "Gather" and isinstance(node.inputs[0], gs.Constant) and _is_float32(node.inputs[0])

    def _narrow_inputs(
        self, graph: gs.Graph, node: gs.Node, narrow: set[int], casts: dict[int, gs.Variable]
    ) -> None:
        for index, tensor in enumerate(node.inputs):
            if id(tensor) in narrow or not _is_float32(tensor):
                continue
            if isinstance(tensor, gs.Constant):
                node.inputs[index] = self._narrow_constant(tensor, casts)
                continue
            if id(tensor) not in casts:
                name = unused_name(graph, f"{tensor.name}.{self.dtype.name}")
                casts[id(tensor)] = gs.Variable(name, self.dtype, tensor.shape)
                to = onnx.helper.np_dtype_to_tensor_dtype(self.dtype)
                cast = gs.Node("Cast", name, {"to": to}, [tensor], [casts[id(tensor)]])
                graph.nodes.insert(graph.nodes.index(tensor.inputs[0]) + 1, cast)
            node.inputs[index] = casts[id(tensor)]

    def _narrow_constant(self, tensor: gs.Constant, casts: dict[int, gs.Variable]) -> gs.Constant:
        if id(tensor) not in casts:
            casts[id(tensor)] = constant(
                f"{tensor.name}.{self.dtype.name}", Cast(weight_of(tensor), self.dtype)
            )
        return casts[id(tensor)]

    def _widen(self, graph: gs.Graph, logits: gs.Variable) -> None:
        node = logits.inputs[0]
        assert not consumers(logits)
        narrow = gs.Variable(unused_name(graph, f"logits.{self.dtype.name}"), self.dtype, logits.shape)
        node.outputs[node.outputs.index(logits)] = narrow
        logits.dtype = FLOAT32
        cast = gs.Node(
            "Cast", unused_name(graph, "logits.cast"), {"to": onnx.TensorProto.FLOAT}, [narrow], [logits]
        )
        graph.nodes.append(cast)


def _is_float32(tensor: gs.Variable | gs.Constant) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype) == FLOAT32
