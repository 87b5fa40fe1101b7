"""Making ONNX Runtime widen a weight when its product is due, not before.

What depends on no input is computed before everything else: a graph with quantized weights would hold all of
them as floats at once, and one with fp16 weights, for which the CPU has no products, all of them as float32.
Here each weight is made to depend on the activation that meets it, through zero times a dimension of that
activation: added to the scale of a quantized weight, or to the shape of an fp16 one. No bit changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

ZERO = "deferral.zero"


@dataclass(frozen=True)
class Operand:
    """A MatMul's stored weight, and the nodes between the two, in order."""

    weight: onnx.TensorProto
    chain: list[onnx.NodeProto]

    @property
    def quantized(self) -> bool:
        """Whether the weight is codes."""
        return bool(self.chain) and self.chain[0].op_type == "DequantizeLinear"


def defer_widening(model: onnx.ModelProto) -> int:
    """Tie every MatMul's quantized or fp16 weight to its activation; return how many there were."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    writers = {output: node for node in graph.node for output in node.output}
    operands = {
        id(node): operand
        for node in graph.node
        if node.op_type == "MatMul" and (operand := _operand(node, stored, writers)) is not None
    }
    moved = {id(link) for operand in operands.values() for link in operand.chain}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if id(node) in operands:
            operand = operands[id(node)]
            gate = _gated_scale if operand.quantized else _gated_weight
            nodes += [*gate(graph, node, operand, stored), *operand.chain]
        if id(node) not in moved:
            nodes.append(node)
    if operands:
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), ZERO))
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
    return len(operands)


def _operand(
    product: onnx.NodeProto, stored: dict[str, onnx.TensorProto], writers: dict[str, onnx.NodeProto]
) -> Operand | None:
    """Return the weight of a product that must wait; None if it has none, or nothing to wait for."""
    chain: list[onnx.NodeProto] = []
    name = product.input[1]
    while name in writers and len(writers[name].input) > 0:
        chain.insert(0, writers[name])
        name = writers[name].input[0]
    if name not in stored or product.input[0] not in writers:
        return None
    operand = Operand(stored[name], chain)
    if operand.quantized:
        return operand if chain[0].input[1] in stored else None
    return operand if operand.weight.data_type == onnx.TensorProto.FLOAT16 else None


def _gated_scale(
    graph: onnx.GraphProto, product: onnx.NodeProto, operand: Operand, stored: dict[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    """Return nodes that compute a quantized weight's scale again; rewire its first dequantization."""
    first = operand.chain[0]
    stem = f"{first.output[0]}.deferral"
    scale, first.input[1] = first.input[1], f"{stem}.scale"
    return [
        *_zero(product.input[0], stem),
        helper.make_node("Cast", [f"{stem}.none"], [f"{stem}.float"], to=stored[scale].data_type),
        helper.make_node("Squeeze", [f"{stem}.float"], [f"{stem}.zero"]),
        helper.make_node("Add", [scale, f"{stem}.zero"], [f"{stem}.scale"]),
    ]


def _gated_weight(
    graph: onnx.GraphProto, product: onnx.NodeProto, operand: Operand, stored: dict[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    """Return nodes that reshape a float weight to its own shape; rewire whoever read it."""
    stem = f"{product.output[0]}.deferral"
    dimensions = numpy_helper.from_array(np.array(operand.weight.dims, np.int64), f"{stem}.dimensions")
    graph.initializer.append(dimensions)
    reader, index = (operand.chain[0], 0) if operand.chain else (product, 1)
    reader.input[index] = f"{stem}.weight"
    return [
        *_zero(product.input[0], stem),
        helper.make_node("Add", [dimensions.name, f"{stem}.none"], [f"{stem}.shape"]),
        helper.make_node("Reshape", [operand.weight.name, f"{stem}.shape"], [f"{stem}.weight"]),
    ]


def _zero(activation: str, stem: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Shape", [activation], [f"{stem}.size"], start=0, end=1),
        helper.make_node("Mul", [f"{stem}.size", ZERO], [f"{stem}.none"]),
    ]
