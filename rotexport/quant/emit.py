"""Building the nodes of a quantizer: each named after its site, collected in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rotexport.graph.weights import InMemory, Weight, constant
from rotexport.quant.formats import NumberFormat

FLOAT = np.dtype(np.float32)
INT64 = np.dtype(np.int64)

Shape = Sequence[int | str | None] | None


class Emitter:
    """Makes nodes and constants whose names begin with `stem`, and keeps the nodes in order."""

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.nodes: list[gs.Node] = []

    def emit(
        self,
        op: str,
        label: str,
        inputs: Sequence[gs.Variable | gs.Constant],
        shape: Shape,
        dtype: np.dtype[Any] = FLOAT,
        **attributes: Any,
    ) -> gs.Variable:
        """Append a node with one output; return it."""
        name = f"{self.stem}.{label}"
        output = gs.Variable(name, dtype, None if shape is None else list(shape))
        self.nodes.append(gs.Node(op, name, attributes, list(inputs), [output]))
        return output

    def lazy(self, label: str, weight: Weight) -> gs.Constant:
        """Return a constant that stays lazy."""
        return constant(f"{self.stem}.{label}", weight)

    def number(self, label: str, value: float, dtype: np.dtype[Any] = FLOAT) -> gs.Constant:
        """Return a scalar."""
        return self.lazy(label, InMemory(np.array(value, dtype)))

    def integers(self, label: str, values: Sequence[int]) -> gs.Constant:
        """Return an int64 vector."""
        return self.lazy(label, InMemory(np.array(values, np.int64)))

    def cast(self, label: str, values: gs.Variable, dtype: np.dtype[Any]) -> gs.Variable:
        """Append a Cast unless the type is right already."""
        if float_type(values) == dtype:
            return values
        element = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return self.emit("Cast", label, [values], values.shape, dtype, to=element)

    def quantize(
        self, label: str, values: gs.Variable, scale: gs.Constant, number_format: NumberFormat
    ) -> gs.Variable:
        """Append QuantizeLinear with one scale; without the attribute ONNX's output would be uint8."""
        storage = number_format.storage
        element = onnx.helper.np_dtype_to_tensor_dtype(storage)
        inputs = [values, scale]
        return self.emit("QuantizeLinear", label, inputs, values.shape, storage, output_dtype=element)

    def dequantize(
        self,
        label: str,
        codes: gs.Variable | gs.Constant,
        scale: gs.Constant,
        dtype: np.dtype[Any] | None = None,
        zero: gs.Constant | None = None,
        **attributes: int,
    ) -> gs.Variable:
        """Append DequantizeLinear; the result has the scale's type unless `dtype` says otherwise."""
        kept = np.dtype(scale.dtype)
        if dtype is not None and dtype != kept:
            attributes["output_dtype"] = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        inputs = [codes, scale] if zero is None else [codes, scale, zero]
        return self.emit("DequantizeLinear", label, inputs, codes.shape, dtype or kept, **attributes)

    def end_with(self, output: gs.Variable) -> None:
        """Make the last node write `output` in place of its own result."""
        self.nodes[-1].outputs[0] = output


def float_type(values: gs.Variable) -> np.dtype[Any]:
    """Return the element type of an activation: float32 where the graph does not say."""
    return FLOAT if values.dtype is None else np.dtype(values.dtype)


def insert(graph: gs.Graph, before: dict[int, list[gs.Node]], after: dict[int, list[gs.Node]]) -> None:
    """Put new nodes directly before and after existing ones, given by `id`."""
    graph.nodes[:] = [
        placed
        for node in list(graph.nodes)
        for placed in (*before.get(id(node), ()), node, *after.get(id(node), ()))
    ]
