"""Small rewrites that bring a traced graph to its canonical form, in place.

Shapes: a reshape takes constants (0 keeps a dimension, -1 is inferred) instead of a computed shape, and
rows [B, S, H] are not flattened to [B*S, H] and back. Names: symbolic dimensions are `batch`, `sequence`,
`past` and `total`.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.errors import UnsupportedModelError
from rotexport.graph.edit import consumers, drop_unused, replace_reads

_POINTWISE = {"Add", "Sub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Abs"} | {
    "Relu",
    "LeakyRelu",
    "Elu",
    "Gelu",
    "Erf",
    "Sigmoid",
    "Tanh",
    "Softplus",
}
_ROW_NORMS = {"LayerNormalization", "RMSNormalization"}
# Operators whose meaning depends on the data routed through them; nothing downstream could treat them.
_ROUTING = {"TopK", "NonZero", "If", "Loop", "Scan", "ScatterElements", "ScatterND", "Unique", "Compress"}


def canonicalize(graph: gs.Graph) -> None:
    """Apply every rewrite.

    Raises:
        UnsupportedModelError: a node routes data (mixture of experts, data-dependent control flow).

    """
    for node in graph.nodes:
        if node.op in _ROUTING:
            raise UnsupportedModelError(
                f"the traced model holds '{node.op}', which routes data; it has no canonical form"
            )
    _name_total(graph)
    for node in list(graph.nodes):
        if node.op == "Reshape":
            _keep_rows(graph, node)
    for node in list(graph.nodes):
        if node.op == "Gemm":
            _split_gemm(graph, node)
        elif node.op == "Shape":
            _measure_inputs(graph, node)
        elif node.op == "Concat" and node.attrs["axis"] < 0:
            node.attrs["axis"] += len(node.outputs[0].shape)
        elif (kept := _unchanged(node)) is not None:
            replace_reads(node.outputs[0], kept, consumers(node.outputs[0]))
    for node in graph.nodes:
        if node.op == "Reshape":
            _fix_shape(node)
    drop_unused(graph)


def _name_total(graph: gs.Graph) -> None:
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.shape is not None:
            tensor.shape = [
                "total" if dim in ("past + sequence", "sequence + past") else dim for dim in tensor.shape
            ]


def _keep_rows(graph: gs.Graph, flatten: gs.Node) -> None:
    """Undo `flatten` if everything between it and the reshapes back treats rows one by one."""
    rows, flat = flatten.inputs[0], flatten.outputs[0]
    leading, rest = list(rows.shape[:2]), rows.shape[2:]
    if leading != ["batch", "sequence"] or not rest or list(flat.shape[1:]) != [math.prod(rest)]:
        return
    region = {id(flat): flat}
    back: list[gs.Node] = []
    for node in graph.nodes:
        if not any(id(tensor) in region for tensor in node.inputs):
            continue
        output = node.outputs[0]
        if node.op == "Reshape" and list(output.shape) == [*leading, node.inputs[0].shape[-1]]:
            back.append(node)
        elif _treats_rows(node, region):
            region[id(output)] = output
        else:
            return
    for tensor in region.values():
        tensor.shape = [*leading, tensor.shape[-1]]
    for node in back if len(rest) > 1 else [flatten, *back]:  # heads still have to be joined
        _bypass(node)


def _treats_rows(node: gs.Node, region: dict[int, gs.Variable]) -> bool:
    others = [tensor for tensor in node.inputs if id(tensor) not in region]
    if node.op in _POINTWISE:
        return all(len(tensor.shape) <= 1 for tensor in others)
    if node.op in _ROW_NORMS:
        return (
            id(node.inputs[0]) in region
            and node.attrs["axis"] in (-1, 1)
            and len(others) == len(node.inputs) - 1
        )
    if node.op in ("MatMul", "Gemm"):
        return id(node.inputs[0]) in region and len(others) == len(node.inputs) - 1
    return False


def _split_gemm(graph: gs.Graph, node: gs.Node) -> None:
    """`Gemm(x, W, b)` is `Add(MatMul(x, W), b)`."""
    attributes = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | node.attrs
    if (attributes["alpha"], attributes["beta"], attributes["transA"]) != (1.0, 1.0, 0):
        raise UnsupportedModelError(f"node '{node.name}' scales or transposes inside Gemm ({attributes})")
    x, weight, *bias = node.inputs
    output = node.outputs[0]
    place = graph.nodes.index(node)
    node.inputs.clear()
    node.outputs.clear()
    parts: list[gs.Node] = []
    if attributes["transB"]:
        turned = gs.Variable(f"{weight.name}.transposed", weight.dtype, weight.shape[::-1])
        parts.append(gs.Node("Transpose", attrs={"perm": [1, 0]}, inputs=[weight], outputs=[turned]))
        weight = turned
    product = gs.Variable(f"{output.name}.product", output.dtype, output.shape) if bias else output
    parts.append(gs.Node("MatMul", inputs=[x, weight], outputs=[product]))
    if bias:
        parts.append(gs.Node("Add", inputs=[product, bias[0]], outputs=[output]))
    graph.nodes[place : place + 1] = parts


def _measure_inputs(graph: gs.Graph, node: gs.Node) -> None:
    """Read a symbolic dimension off the model's inputs, not off whatever tensor the tracer chose."""
    start, end = node.attrs.get("start", 0), node.attrs.get("end")
    if end is None or end - start != 1:
        return
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    source = {"batch": ("input_ids", 0), "sequence": ("input_ids", 1), "total": ("attention_mask", 1)}
    name, axis = source.get(node.inputs[0].shape[start], (None, 0))
    if name is not None:
        node.inputs[0] = inputs[name]
        node.attrs.update(start=axis, end=axis + 1)


def _unchanged(node: gs.Node) -> gs.Variable | None:
    """Return the input that a node passes on as it is, if any."""
    if node.op == "Identity":
        return node.inputs[0]
    if node.op == "And":
        true = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant) and np.all(tensor.values)]
        return next((tensor for tensor in node.inputs if tensor is not true[0]), None) if true else None
    if node.op not in ("Cast", "Expand", "Reshape", "Slice"):
        return None
    source, target = node.inputs[0], node.outputs[0]
    same = source.dtype == target.dtype and list(source.shape) == list(target.shape)
    return source if same else None


def _bypass(node: gs.Node) -> None:
    source, target = node.inputs[0], node.outputs[0]
    replace_reads(target, source, consumers(target))


def _fix_shape(node: gs.Node) -> None:
    """Write the target of a reshape as constants, from the shapes that the tracer recorded."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    target = []
    for axis, dim in enumerate(after):
        if isinstance(dim, int):
            target.append(dim)
        else:
            target.append(0 if axis < len(before) and before[axis] == dim else -1)
    if target.count(-1) > 1:
        return
    node.inputs[1] = gs.Constant(f"{node.outputs[0].name}.shape", np.array(target, np.int64))
    node.attrs.pop("allowzero", None)
