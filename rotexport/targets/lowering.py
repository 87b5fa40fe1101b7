"""What differs between the portable model and what the builder reads.

The portable `model.onnx` stays as ONNX Runtime needs it; the builder gets a sibling file over the same
weights, in which attention may be decomposed (float32, unusual head sizes), a soft cap is spelled out and a
selection of many is made in steps.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from rotexport.errors import TargetError
from rotexport.targets.selection import Selections

_HEAD_AXIS: Final = 1


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that TensorRT and TensorRT-RTX build.

    Every Attention gets `TRT_decomposable`, which keeps the fused kernel wherever there is one and which
    ONNX Runtime refuses; an Attention with a soft cap, which the parser refuses, becomes its formula. A TopK
    of more than the builder allows becomes several.

    Raises:
        TargetError: a soft-capped attention whose head counts are not in the graph.

    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    selections = Selections(model, lowered.graph)
    for node in model.graph.node:
        if selections.too_large(node):
            nodes.extend(selections.split(node))
        elif node.op_type != "Attention" or node.domain:
            nodes.append(node)
        elif _float(node, "softcap"):
            nodes.extend(_soft_capped(lowered.graph, node))
        else:
            marked = onnx.NodeProto()
            marked.CopyFrom(node)
            marked.attribute.append(helper.make_attribute("TRT_decomposable", 1))
            nodes.append(marked)
    del lowered.graph.node[:]
    lowered.graph.node.extend(nodes)
    return lowered


def _soft_capped(graph: onnx.GraphProto, attention: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Spell out softmax(c tanh(scale q kᵀ / c) + mask) v, the queries of a group sharing their key head."""
    make = _Formula(graph, attention.name)
    query, key, value, *mask = attention.input
    heads, groups, size = make.static(query, 1), make.static(key, 1), make.static(query, 3)
    cap, scale = _float(attention, "softcap"), _float(attention, "scale") or size**-0.5
    dtype = make.dtype(query)
    number = helper.tensor_dtype_to_np_dtype(dtype)
    grouped = make.node(
        "Reshape", "query", query, make.constant("groups", [0, groups, heads // groups, -1, size])
    )
    axis = make.constant("axis", [2])
    keys = make.node("Transpose", "keys", make.node("Unsqueeze", "key", key, axis), perm=[0, 1, 2, 4, 3])
    scaled = make.node("Mul", "scaled", grouped, make.constant("scale", scale / cap, number))
    tanh = make.node("Tanh", "tanh", make.node("MatMul", "scores", scaled, keys))
    logits = make.node("Mul", "capped", tanh, make.constant("cap", cap, number))
    if mask:
        rows = make.node("Unsqueeze", "mask", mask[0], make.constant("head", [_HEAD_AXIS]))
        logits = make.node("Add", "masked", logits, rows)
    wide = make.node("Cast", "wide", logits, to=onnx.TensorProto.FLOAT)
    weights = make.node("Cast", "weights", make.node("Softmax", "softmax", wide, axis=-1), to=dtype)
    mixed = make.node("MatMul", "mixed", weights, make.node("Unsqueeze", "value", value, axis))
    shape = make.constant("heads", [0, heads, -1, make.static(value, 3)])
    make.nodes.append(helper.make_node("Reshape", [mixed, shape], list(attention.output), attention.name))
    return make.nodes


class _Formula:
    """Collects the nodes that replace one node, named after it."""

    def __init__(self, graph: onnx.GraphProto, stem: str) -> None:
        self._graph, self._stem = graph, stem
        self.nodes: list[onnx.NodeProto] = []

    def node(self, op: str, label: str, *inputs: str, **attributes: object) -> str:
        """Append a node with one output; return that output's name."""
        name = f"{self._stem}.{label}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def constant(self, label: str, value: object, dtype: npt.DTypeLike = np.int64) -> str:
        """Add an initializer; return its name."""
        name = f"{self._stem}.{label}.constant"
        self._graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def dtype(self, tensor: str) -> int:
        """Return a tensor's ONNX element type."""
        return int(self._type(tensor).elem_type)

    def static(self, tensor: str, axis: int) -> int:
        """Return a fixed dimension."""
        size = self._type(tensor).shape.dim[axis].dim_value
        if not size:
            raise TargetError(
                f"soft-capped attention '{self._stem}': axis {axis} of '{tensor}' has no fixed size"
            )
        return int(size)

    def _type(self, tensor: str) -> onnx.TypeProto.Tensor:
        for value in (*self._graph.value_info, *self._graph.input, *self._graph.output):
            if value.name == tensor:
                return value.type.tensor_type
        raise TargetError(f"soft-capped attention '{self._stem}': the graph states no shape for '{tensor}'")


def _float(node: onnx.NodeProto, name: str) -> float:
    return next((float(attribute.f) for attribute in node.attribute if attribute.name == name), 0.0)
