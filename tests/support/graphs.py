"""Graphs in ONNX text, and running them: what the tests of passes share."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from rotexport.graph.io import WeightFile, save_model


def parse(text: str) -> gs.Graph:
    """Read a model in ONNX text into the passes' IR, with shapes inferred.

    The text format has no dots followed by digits in names: write `block__0__input` for `block.0.input`.
    """
    model = onnx.parser.parse_model(_HEADER + text)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = gs.import_onnx(model)
    for tensor in graph.tensors().values():
        tensor.name = tensor.name.replace("__", ".")
    for node in graph.nodes:
        node.name = node.name or node.outputs[0].name.replace(".", "_")
    return graph


def fill(graph: gs.Graph, seed: int = 0) -> gs.Graph:
    """Turn every graph input called like a weight (upper-case first letter) into a random constant."""
    rng = np.random.default_rng(seed)
    for tensor in [t for t in graph.inputs if t.name[0].isupper()]:
        graph.inputs.remove(tensor)
        values = rng.standard_normal(tensor.shape).astype(tensor.dtype)
        tensor.to_constant(values)
    return graph


def graph_of(text: str, seed: int = 0) -> gs.Graph:
    """Parse and fill."""
    return fill(parse(text), seed)


def run(graph: gs.Graph, **feeds: Any) -> list[np.ndarray]:
    """Run a graph in ONNX Runtime without optimizations; return its outputs in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_model(graph.copy(), path, WeightFile(path.with_suffix(".data")))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return session.run(None, feeds)


def ops(graph: gs.Graph) -> list[str]:
    """Return the operators of a graph, in order."""
    return [node.op for node in graph.nodes]


_HEADER = '<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>\n'
