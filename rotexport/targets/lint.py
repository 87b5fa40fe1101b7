"""Patterns that TensorRT and TensorRT-RTX build without complaint and then run wrongly, or refuse obscurely.

Seen with TensorRT-RTX 1.7.1: of block scales behind quantized activations only the first block's are applied;
integer products with half-precision scales keep their accumulator in half precision; `is_causal` aligns to
the upper left corner; unknown inputs are dropped. A graph with one of these is refused before it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import onnx
from onnx import TensorProto

from rotexport.errors import TargetError
from rotexport.graph.functions import DOMAIN

_HALF: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INTEGER: Final = (TensorProto.INT8, TensorProto.INT4)
_QUANTIZED: Final = (*_INTEGER, TensorProto.FLOAT8E4M3FN)
_PASS_THROUGH: Final = ("Reshape", "Transpose", "Identity", "Unsqueeze", "Squeeze", "Split", "Cast")


class Graph:
    """A model's graph, its functions expanded, indexed by tensor name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {output: node for node in self.nodes for output in node.output}

    def dequantize(self, tensor: str) -> onnx.NodeProto | None:
        """Return the DequantizeLinear a value comes from, looking through operators that only move it."""
        node = self.producers.get(tensor)
        while node is not None and node.op_type in _PASS_THROUGH:
            node = self.producers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def dtype(self, tensor: str) -> int | None:
        """Return the element type of an initializer or of a QuantizeLinear's output."""
        if tensor in self.initializers:
            return int(self.initializers[tensor].data_type)
        node = self.producers.get(tensor)
        return (
            _attribute(node, "output_dtype")
            if node is not None and node.op_type == "QuantizeLinear"
            else None
        )


def lint(model: onnx.ModelProto) -> None:
    """Raise TargetError, naming the nodes, when the graph holds patterns that the builders get wrong."""
    graph = Graph(model)
    found = [
        f"  {node.name or node.op_type}: {problem}"
        for node in graph.nodes
        for rule in RULES
        for problem in rule(graph, node)
    ]
    if found:
        raise TargetError("the graph holds what TensorRT does not run as written:\n" + "\n".join(found))


def _products(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Two quantized factors: scales in float32, never in blocks."""
    if node.op_type != "MatMul":
        return
    left, right = graph.dequantize(node.input[0]), graph.dequantize(node.input[1])
    if left is None or right is None:
        return
    if _attribute(left, "block_size") or _attribute(right, "block_size"):
        yield "of a quantized product's block scales only the first block's are applied; multiply by groups"
    for factor in (left, right):
        if graph.dtype(factor.input[0]) in _INTEGER and graph.dtype(factor.input[1]) in _HALF:
            yield f"half-precision scale '{factor.input[1]}' overflows the integer product; make it float32"


def _quantizers(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Symmetric, of a stated type."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    if len(node.input) > 2 and node.input[2]:
        yield "TensorRT has no zero points; quantize symmetrically, without the third input"
    elif node.op_type == "QuantizeLinear" and not _attribute(node, "output_dtype"):
        yield "without output_dtype ONNX quantizes to uint8 and TensorRT to int8; set output_dtype"


def _attention(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Explicit mask, no cache inside."""
    if node.op_type != "Attention" or node.domain:
        return
    if _attribute(node, "is_causal"):
        yield "is_causal aligns to the upper left corner, which hides the cache; use an additive mask"
    if len(node.input) > 4 or len(node.output) > 1:
        yield "inputs after the mask and outputs after the first are dropped; concatenate the cache outside"


def _tables(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Quantized constants reach DequantizeLinear only, or operators of ours, which a plugin runs."""
    if node.op_type == "DequantizeLinear" or node.domain == DOMAIN:
        return
    for name in node.input:
        if name in graph.initializers and graph.initializers[name].data_type in _QUANTIZED:
            yield f"the quantized constant '{name}' may only feed DequantizeLinear; use that with scale 1"


Rule = Callable[[Graph, onnx.NodeProto], Iterator[str]]
RULES: Final[tuple[Rule, ...]] = (_products, _quantizers, _attention, _tables)


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), 0)
