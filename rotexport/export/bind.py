"""Weights into a graph: every parameter input becomes a lazy constant, constant arithmetic an expression."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.errors import CheckpointError
from rotexport.graph.edit import consumers, drop_unused, replace_reads
from rotexport.graph.weights import Affine, Cast, Transposed, Weight, constant, weight_of

_FLOAT = np.dtype(np.float32)


def bind_weights(graph: gs.Graph, inputs: int, weight: Callable[[str], Weight]) -> None:
    """Replace all graph inputs after the first `inputs` by constants that `weight(name)` describes.

    Transposes of weights and sums and products of a weight and a scalar become part of the expression, so a
    matrix is `MatMul(x, [K, N] constant)` and Gemma's norm scale one constant. Numbers are float32.

    Raises:
        CheckpointError: a weight is missing, or its shape is not the model's.

    """
    for tensor in graph.inputs[inputs:]:
        lazy = weight(tensor.name)
        if lazy.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"weight '{tensor.name}' has shape {lazy.shape}; the config makes it {tuple(tensor.shape)}"
            )
        bound = constant(tensor.name, lazy if lazy.dtype == _FLOAT else Cast(lazy, _FLOAT))
        replace_reads(tensor, bound, consumers(tensor))
    del graph.inputs[inputs:]
    for node in list(graph.nodes):
        folded = _fold(node)
        if folded is not None:
            target = node.outputs[0]
            name = _name(node)
            replace_reads(target, constant(name, folded), consumers(target))
    drop_unused(graph)


def _fold(node: gs.Node) -> Weight | None:
    """Return the value of a node that computes with weights and scalars only, as an expression."""
    if not node.inputs or not all(isinstance(tensor, gs.Constant) for tensor in node.inputs):
        return None
    if node.op == "Transpose" and list(node.attrs["perm"]) == [1, 0]:
        return Transposed(weight_of(node.inputs[0]))
    if node.op not in ("Add", "Mul"):
        return None
    scalar, tensor = sorted((weight_of(tensor) for tensor in node.inputs), key=lambda w: len(w.shape))
    if np.prod(scalar.shape) != 1:
        return None
    number = float(scalar.read().reshape(()))
    return Affine(tensor, 1.0, number) if node.op == "Add" else Affine(tensor, number, 0.0)


def _name(node: gs.Node) -> str:
    """Name a folded constant after its weight; a weight that is also read as it is keeps its name."""
    sources = [tensor for tensor in node.inputs if len(tensor.shape) > 0]
    source = max(sources, key=lambda tensor: len(tensor.shape))
    alone = all(reader is node for reader in consumers(source))
    name: str = source.name
    return name if alone else f"{name}.{node.op.lower()}d"
