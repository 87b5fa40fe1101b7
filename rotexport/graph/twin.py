"""A float32 copy of a bfloat16 graph, for runtimes without bfloat16 kernels.

Weights and codes are exactly those of the original (rounded to bfloat16, then widened); only arithmetic
between them is wider. It is what validation runs where ONNX Runtime could not run the graph itself.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rotexport.graph.io import Scratch, save_model
from rotexport.graph.weights import Cast, set_weight, weight_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)


def float32_twin(graph: gs.Graph) -> gs.Graph:
    """Return `graph` itself where nothing is bfloat16, else a copy in which all of that is float32."""
    if not any(_is_bfloat16(tensor) for tensor in graph.tensors().values()):
        return graph
    twin = graph.copy()
    for tensor in twin.tensors().values():
        if not _is_bfloat16(tensor):
            continue
        if isinstance(tensor, gs.Constant):
            set_weight(tensor, Cast(weight_of(tensor), FLOAT32))
        else:
            tensor.dtype = FLOAT32
    for node in twin.nodes:
        for key in ("to", "output_dtype", "out_type"):
            if node.attrs.get(key) in (onnx.TensorProto.BFLOAT16, BFLOAT16):
                node.attrs[key] = onnx.TensorProto.FLOAT
    return twin


def runnable(graph: gs.Graph, saved: Path, scratch: Scratch) -> Path:
    """Return a file that ONNX Runtime can run: the saved graph, or its float32 twin where it is bfloat16."""
    twin = float32_twin(graph)
    if twin is graph:
        return saved
    path = scratch.directory / "twin.onnx"
    save_model(twin, path, scratch)
    return path


def _is_bfloat16(tensor: gs.Variable | gs.Constant) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype) == BFLOAT16
