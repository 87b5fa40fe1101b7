"""What a QuantizedLinear takes along of the operators behind its product."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from rotexport.graph.edit import consumers, producer


@dataclass(frozen=True)
class Ending:
    """What comes last in an operator: the ending of its name, further inputs, the result it takes over."""

    name: str = ""
    operands: tuple[gs.Variable, ...] = ()
    output: gs.Variable | None = None


def absorb_bias(graph: gs.Graph, node: gs.Node) -> gs.Constant | None:
    """Return the vector that is added to a product and to nothing else, and let the product write the sum."""
    reader = _only_reader(graph, node)
    if reader is None or reader.op != "Add":
        return None
    vector = next((t for t in reader.inputs if isinstance(t, gs.Constant)), None)
    if vector is None or tuple(vector.shape) != (node.outputs[0].shape[-1],):
        return None
    output = reader.outputs[0]
    _detach(graph, reader)
    node.outputs = [output]
    return vector


def find_ending(graph: gs.Graph, node: gs.Node) -> Ending:
    """Take the node behind a product out of the graph if the operator can end with it; return the ending."""
    reader = _only_reader(graph, node)
    output = node.outputs[0]
    if reader is None or reader.op not in ("Add", "Mul") or len(reader.inputs) != 2:
        return Ending()
    other = reader.inputs[1] if reader.inputs[0] is output else reader.inputs[0]
    if other is output or not isinstance(other, gs.Variable) or not _alike(other, output):
        return Ending()
    if reader.op == "Mul":
        gate = _gate_of(other)
        if gate is None or not _alike(gate, output):
            return Ending()
        other = gate
    result = reader.outputs[0]
    _detach(graph, reader)
    return Ending("Residual" if reader.op == "Add" else "Gated", (other,), result)


def _only_reader(graph: gs.Graph, node: gs.Node) -> gs.Node | None:
    """Return the one node that reads a node's output, unless the graph outputs that too."""
    output = node.outputs[0]
    readers = consumers(output)
    if len(readers) != 1 or any(output is tensor for tensor in graph.outputs):
        return None
    return readers[0]


def _gate_of(tensor: gs.Variable) -> gs.Variable | None:
    """Return g where the tensor is g * sigmoid(g)."""
    product = producer(tensor)
    if product is None or product.op != "Mul":
        return None
    for gate, opening in (product.inputs, product.inputs[::-1]):
        sigmoid = producer(opening)
        if sigmoid is not None and sigmoid.op == "Sigmoid" and sigmoid.inputs[0] is gate:
            return gate if isinstance(gate, gs.Variable) else None
    return None


def _alike(one: gs.Variable, other: gs.Variable) -> bool:
    """Whether two tensors are known to have the same shape and type, so that neither is broadcast."""
    return one.shape is not None and one.shape == other.shape and one.dtype == other.dtype


def _detach(graph: gs.Graph, node: gs.Node) -> None:
    node.inputs.clear()
    node.outputs.clear()
    graph.nodes.remove(node)
