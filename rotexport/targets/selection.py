"""The k largest or smallest of more candidates than one TopK of TensorRT gives.

    values, indices = TopK(x, k)    ->    v0, i0 = TopK(x, 3840)
                                          v1, i1 = TopK(x with a worst value at i0, k - 3840)
                                          ...
                                          values, indices = Concat(v0, v1, ...), Concat(i0, i1, ...)

Equal candidates come in the order of their places, as they do without: each TopK leaves the later ones.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

LARGEST_K: Final = 3840  # of TensorRT-RTX 1.7.1: "K exceeds the maximum value allowed"


class Selections:
    """Splits the TopK nodes of a model whose k is a constant beyond `LARGEST_K`.

    Args:
        model: whose nodes are looked at, unchanged.
        graph: takes the constants that the new nodes read.

    """

    def __init__(self, model: onnx.ModelProto, graph: onnx.GraphProto) -> None:
        self._model, self._graph = model, graph
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._types: dict[str, int] = {}

    def too_large(self, node: onnx.NodeProto) -> bool:
        """Whether a node asks for more than one TopK gives."""
        return node.op_type == "TopK" and not node.domain and (self._count(node) or 0) > LARGEST_K

    def split(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return nodes that give what the node gives."""
        found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        axis, largest = found.get("axis", -1), bool(found.get("largest", 1))
        stem = node.name or node.output[0]
        worst = self._constant(f"{stem}.worst", self._worst(node.input[0], largest))
        left, candidates = self._count(node) or 0, node.input[0]
        nodes: list[onnx.NodeProto] = []
        parts: list[tuple[str, str]] = []
        while left:
            here = f"{stem}.{len(parts)}"
            count = min(left, LARGEST_K)
            left -= count
            k = self._constant(f"{here}.k", np.array([count], np.int64))
            part = (f"{here}.values", f"{here}.indices")
            nodes.append(
                helper.make_node("TopK", [candidates, k], part, here, axis=axis, largest=int(largest))
            )
            parts.append(part)
            if left:
                shape, fill, rest = (f"{here}.{label}" for label in ("shape", "fill", "rest"))
                scattered = [candidates, part[1], fill]
                nodes += [
                    helper.make_node("Shape", [part[1]], [shape], shape),
                    helper.make_node("Expand", [worst, shape], [fill], fill),
                    helper.make_node("ScatterElements", scattered, [rest], rest, axis=axis),
                ]
                candidates = rest
        for output, names in zip(node.output, zip(*parts, strict=True), strict=True):
            nodes.append(helper.make_node("Concat", list(names), [output], f"{output}.joined", axis=axis))
        return nodes

    def _count(self, node: onnx.NodeProto) -> int | None:
        tensor = self._initializers.get(node.input[1])
        return None if tensor is None else int(numpy_helper.to_array(tensor).reshape(-1)[0])

    def _worst(self, candidates: str, largest: bool) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        """Return a value, of the candidates' type, that is chosen after all others."""
        if not self._types:
            inferred = onnx.shape_inference.infer_shapes(self._model).graph
            values = (*inferred.input, *inferred.value_info, *inferred.output)
            self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        dtype = helper.tensor_dtype_to_np_dtype(self._types[candidates])
        if np.issubdtype(dtype, np.integer):
            limits = np.iinfo(dtype)
            return np.array(limits.min if largest else limits.max, dtype)
        return np.array(-np.inf if largest else np.inf, dtype)

    def _constant(self, name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name
