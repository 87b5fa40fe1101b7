"""ONNX nodes that compute a transform where it cannot be folded.

Every function takes the name of its result and returns the nodes, in order, and that result. Constants are
named after the result and have the type of what they multiply, so a precision pass sees nothing special.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from rotexport.transforms.constructions import sylvester

Array: TypeAlias = npt.NDArray[Any]
Online: TypeAlias = "tuple[list[gs.Node], gs.Variable]"

DOMAIN = "rotexport"
WHOLE = 128
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}  # TensorRT then prefers the kernel to the body


def fast_hadamard(name: str, x: gs.Variable, signs: Array, base: Array, power: int) -> Online:
    """Return FastHadamard: (x · signs) times base ⊗ Sylvester(power) / √n, in blocks of n = m · power.

    Sylvester's factor is split in two so that the body's two matrix products cost least: tensor cores
    multiply by a matrix of up to `WHOLE` as fast as by its factors.
    """
    m = len(base)
    halves = (1 << bits for bits in range(power.bit_length()))
    hi = 1 if m == 1 and power <= WHOLE else min(halves, key=lambda p: m * p + power // p)
    tables = {"base": base, "hi": sylvester(hi), "lo": sylvester(power // hi)}
    inputs = [x, gs.Constant(f"{name}.signs", signs.astype(_dtype(x)))]
    inputs += [gs.Constant(f"{name}.{key}", np.array(table, np.int8)) for key, table in tables.items()]
    nodes, result = _node("FastHadamard", name, inputs, dict(PLUGIN))
    nodes[0].domain = DOMAIN
    return nodes, result


def kronecker(name: str, x: gs.Variable, scale: Array, left: Array, right: Array) -> Online:
    """Return KroneckerTransform: (x · scale)(left ⊗ right), `scale` a vector or one number."""
    tables = {"scale": scale, "left": left, "right": right}
    inputs = [x, *(gs.Constant(f"{name}.{key}", table.astype(_dtype(x))) for key, table in tables.items())]
    nodes, result = _node("KroneckerTransform", name, inputs)
    nodes[0].domain = DOMAIN
    return nodes, result


def multiply(name: str, x: gs.Variable, vector: Array) -> Online:
    """Return x · vector, elementwise along the last axis."""
    return _node("Mul", name, [x, gs.Constant(f"{name}.factor", vector.astype(_dtype(x)))])


def dense(name: str, x: gs.Variable, matrix: Array) -> Online:
    """Return x · matrix, as a KroneckerTransform: a MatMul by a constant is one of the model's linears."""
    return kronecker(name, x, np.ones(1), np.ones((1, 1)), matrix)


def matmul_left(name: str, x: gs.Variable, matrix: Array) -> Online:
    """Return matrix · x for each matrix of x [..., a, b]."""
    return _node("MatMul", name, [gs.Constant(f"{name}.matrix", matrix.astype(_dtype(x))), x], like=x)


def gather(name: str, x: gs.Variable, indices: Array) -> Online:
    """Return x[..., indices]."""
    inputs = [x, gs.Constant(f"{name}.indices", indices.astype(np.int64))]
    return _node("Gather", name, inputs, {"axis": -1})


def reshape(name: str, x: gs.Variable, shape: list[int]) -> Online:
    """Return x in a shape whose first dimension, -1, takes what is left."""
    nodes, result = _node("Reshape", name, [x, gs.Constant(f"{name}.shape", np.array(shape, np.int64))])
    result.shape = [f"{name}.rows", *shape[1:]]
    return nodes, result


def reshape_like(name: str, x: gs.Variable, like: gs.Variable) -> Online:
    """Return x in the shape of `like`."""
    rank = None if like.shape is None else [len(like.shape)]
    shape = gs.Variable(f"{name}.shape", np.dtype(np.int64), rank)
    nodes = [gs.Node("Shape", shape.name, inputs=[like], outputs=[shape])]
    more, result = _node("Reshape", name, [x, shape], like=like)
    return nodes + more, result


def _node(
    op: str,
    name: str,
    inputs: list[gs.Variable | gs.Constant],
    attributes: dict[str, Any] | None = None,
    *,
    like: gs.Variable | None = None,
) -> Online:
    """Return a node and its result, of the type and shape of `like` (of the first input when not given)."""
    like = inputs[0] if like is None else like
    result = gs.Variable(name, _dtype(like), None if like.shape is None else list(like.shape))
    return [gs.Node(op, name, attributes, inputs, [result])], result


def _dtype(x: gs.Variable | gs.Constant) -> np.dtype[Any]:
    return np.dtype(np.float32) if x.dtype is None else np.dtype(x.dtype)
