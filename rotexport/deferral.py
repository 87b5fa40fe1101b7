"""Making ONNX Runtime dequantize a weight when its product is due, not before.

What depends on no input is computed before everything else: a graph with quantized weights would hold all of
them as floats at once. Here the scale of every weight is made to depend on the activation that meets it, by
adding zero times a dimension of that activation, which changes no bit of the result.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

ZERO = "deferral.zero"


def defer_dequantization(model: onnx.ModelProto) -> int:
    """Tie the dequantization of every MatMul's weight to its activation; return how many there were."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    writers = {output: node for node in graph.node for output in node.output}
    nodes: list[onnx.NodeProto] = []
    moved: set[int] = set()
    chains = {}
    for node in graph.node:
        chain = _weight_chain(node, stored, writers) if node.op_type == "MatMul" else []
        if chain:
            chains[id(node)] = chain
            moved |= {id(link) for link in chain}
    for node in graph.node:
        if id(node) in moved:
            continue
        for link in chains.get(id(node), ()):
            if link is chains[id(node)][0]:
                nodes += _gate(link, node.input[0], stored[link.input[1]].data_type)
            nodes.append(link)
        nodes.append(node)
    if chains:
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), ZERO))
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
    return len(chains)


def _weight_chain(
    product: onnx.NodeProto, stored: dict[str, onnx.TensorProto], writers: dict[str, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """Return the nodes from a stored, quantized matrix to its product, in order; none if it is not one."""
    chain: list[onnx.NodeProto] = []
    name = product.input[1]
    while name in writers:
        chain.insert(0, writers[name])
        name = writers[name].input[0]
    if not chain or chain[0].op_type != "DequantizeLinear" or name not in stored:
        return []
    return chain if chain[0].input[1] in stored and product.input[0] in writers else []


def _gate(dequantize: onnx.NodeProto, activation: str, element: int) -> list[onnx.NodeProto]:
    """Return nodes that compute the scale again out of itself and the activation; rewire `dequantize`."""
    stem = f"{dequantize.output[0]}.deferral"
    scale, dequantize.input[1] = dequantize.input[1], f"{stem}.scale"
    return [
        helper.make_node("Shape", [activation], [f"{stem}.size"], start=0, end=1),
        helper.make_node("Mul", [f"{stem}.size", ZERO], [f"{stem}.none"]),
        helper.make_node("Cast", [f"{stem}.none"], [f"{stem}.float"], to=element),
        helper.make_node("Squeeze", [f"{stem}.float"], [f"{stem}.zero"]),
        helper.make_node("Add", [scale, f"{stem}.zero"], [f"{stem}.scale"]),
    ]
