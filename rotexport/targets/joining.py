"""One rotation for the queries and keys of an attention, before builders see the graph.

    SinkWindowAttention...(FastHadamard(q), FastHadamard(q'), FastHadamard(k), ...)
        ->  SinkWindowAttention...(Split(FastHadamard(Concat(q, q', k))), ...)

Computes the same numbers: the rotation acts on every head alone. A builder takes its time for each matrix
product, and a GPU for each launch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from rotexport.graph.functions import DOMAIN

OPERATOR: Final = "FastHadamard"
HEADS: Final = {1: "query_heads", 2: "query_heads", 3: "kv_heads"}  # of the inputs that may be rotated


def join_rotations(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Return a model that computes the same, with one rotation per attention where the tables are equal.

    `folder` holds the model's external data.
    """
    joined = onnx.ModelProto()
    joined.CopyFrom(model)
    nodes = list(joined.graph.node)
    tables = _Tables(joined.graph, folder)
    for attention in [n for n in nodes if n.domain == DOMAIN and n.op_type.startswith("SinkWindowAttention")]:
        group = _rotations(attention, nodes, tables)
        if len(group) > 1:
            nodes = _replace(nodes, group, _join(joined.graph, attention, group))
    del joined.graph.node[:]
    joined.graph.node.extend(nodes)
    return joined


class _Tables:
    """Constants compared by what they hold."""

    def __init__(self, graph: onnx.GraphProto, folder: Path) -> None:
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._contents: dict[str, tuple[Any, ...]] = {}
        self._folder = folder

    def content(self, name: str) -> tuple[Any, ...]:
        """Return what tells a constant from others; a tensor that is none is told by its name."""
        if name not in self._contents:
            self._contents[name] = self._read(name)
        return self._contents[name]

    def _read(self, name: str) -> tuple[Any, ...]:
        if name not in self._initializers:
            return (name,)
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self._initializers[name])
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            load_external_data_for_tensor(tensor, str(self._folder))
        array = numpy_helper.to_array(tensor)
        return array.dtype.str, array.shape, array.tobytes()


def _rotations(attention: onnx.NodeProto, nodes: list[onnx.NodeProto], tables: _Tables) -> dict[str, str]:
    """Return the rotated inputs of an attention that one rotation gives: rotated tensor -> its heads."""
    makers = {output: node for node in nodes for output in node.output}
    groups: dict[tuple[Any, ...], dict[str, str]] = {}
    for index, heads in HEADS.items():
        rotated = attention.input[index]
        rotation = makers.get(rotated)
        if rotation is not None and rotation.op_type == OPERATOR and rotation.domain == DOMAIN:
            key = tuple(map(tables.content, rotation.input[1:]))
            groups.setdefault(key, {})[rotated] = heads
    return max(groups.values(), key=len, default={})


def _join(graph: onnx.GraphProto, attention: onnx.NodeProto, group: dict[str, str]) -> list[onnx.NodeProto]:
    """Return the nodes that compute the rotated tensors of a group from one rotation."""
    makers = {output: node for node in graph.node for output in node.output}
    rotations = [makers[rotated] for rotated in group]
    numbers = {attribute.name: attribute.i for attribute in attention.attribute}
    stem = f"{attention.name}.rotated"
    heads = [numbers[name] for name in group.values()]
    sizes = numpy_helper.from_array(np.array(heads, np.int64), f"{stem}.heads")
    graph.initializer.append(sizes)
    graph.value_info.extend(_described(graph, rotations[0].input[0], f"{stem}.fresh", sum(heads)))
    together = onnx.NodeProto()
    together.CopyFrom(rotations[0])
    together.name = stem
    together.input[0] = f"{stem}.fresh"
    together.output[0] = stem
    fresh = [rotation.input[0] for rotation in rotations]
    return [
        helper.make_node("Concat", fresh, [f"{stem}.fresh"], f"{stem}.fresh", axis=1),
        together,
        helper.make_node("Split", [stem, sizes.name], list(group), f"{stem}.apart", axis=1),
    ]


def _described(graph: onnx.GraphProto, like: str, name: str, heads: int) -> list[onnx.ValueInfoProto]:
    """Return the description of a tensor that is like another but for its heads, if that one has one."""
    found = [value for value in graph.value_info if value.name == like][:1]
    described = [onnx.ValueInfoProto() for _ in found]
    for copy, value in zip(described, found, strict=True):
        copy.CopyFrom(value)
        copy.name = name
        copy.type.tensor_type.shape.dim[1].dim_value = heads
    return described


def _replace(
    nodes: list[onnx.NodeProto], group: dict[str, str], joined: list[onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """Put `joined` in the place of the group's last rotation, and behind it what waited for the others."""
    left = sum(node.output[0] in group for node in nodes)
    waiting: set[str] = set()
    ordered: list[onnx.NodeProto] = []
    later: list[onnx.NodeProto] = []
    for node in nodes:
        if node.output[0] in group:
            waiting |= set(node.output)
            left -= 1
            if left == 0:
                ordered += [*joined, *later]
        elif left and waiting & set(node.input):
            waiting |= set(node.output)
            later.append(node)
        else:
            ordered.append(node)
    return ordered
