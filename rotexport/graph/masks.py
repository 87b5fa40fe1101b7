"""Reading what an attention mask means, by evaluating the part of a graph that computes it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from rotexport.errors import UnsupportedModelError
from rotexport.graph.edit import producer
from rotexport.graph.io import to_proto
from rotexport.graph.weights import Array

LONGEST_WINDOW = 1 << 17  # a mask that shows this many tokens is taken to show all
QUERIES = 2


def mask_window(graph: gs.Graph, mask: gs.Variable) -> int | None:
    """Return the window of an additive mask [B, 1, S, T], the query's own position included; None shows all.

    Raises:
        UnsupportedModelError: the mask is neither causal nor causal with a sliding window, or not 0 where
            it shows.

    """
    rows = _evaluate(graph, mask)
    shown = rows == 0
    window = int(shown[-1].sum())
    total = rows.shape[1]
    i = np.arange(total - QUERIES, total)[:, None]
    distance = i - np.arange(total)
    expected = (distance >= 0) & (distance < window if window < total else True)
    if not np.array_equal(shown, expected) or (rows[~shown] > -1e4).any():
        raise UnsupportedModelError(
            f"the attention mask '{mask.name}' is neither causal nor a sliding window; "
            "streaming cannot keep its meaning, use attention.kind: dense"
        )
    return window if window < total else None


def _evaluate(graph: gs.Graph, mask: gs.Variable) -> Array:
    """Return the mask [QUERIES, T] of the last positions of T = LONGEST_WINDOW real tokens."""
    nodes = _ancestors(graph, mask)
    part = gs.Graph(nodes, inputs=graph.inputs[:], outputs=[mask], opset=graph.opset)
    feeds = {
        "input_ids": np.zeros((1, QUERIES), np.int64),
        "attention_mask": np.ones((1, LONGEST_WINDOW), np.int64),
        "position_ids": np.arange(LONGEST_WINDOW - QUERIES, LONGEST_WINDOW)[None],
    }
    read = {tensor.name for node in nodes for tensor in node.inputs}
    part.inputs = [tensor for tensor in graph.inputs if tensor.name in read]
    unknown = [tensor.name for tensor in part.inputs if tensor.name not in feeds]
    if unknown:
        raise UnsupportedModelError(f"the attention mask '{mask.name}' depends on '{unknown[0]}'")
    model = to_proto(part)
    values: Array = ReferenceEvaluator(model).run(None, {t.name: feeds[t.name] for t in part.inputs})[0]
    rows: Array = np.broadcast_to(values, (1, 1, QUERIES, LONGEST_WINDOW))[0, 0].astype(np.float32)
    return rows


def _ancestors(graph: gs.Graph, tensor: gs.Variable) -> list[gs.Node]:
    found: set[int] = set()
    todo = [producer(tensor)]
    while todo:
        node = todo.pop()
        if node is not None and id(node) not in found:
            found.add(id(node))
            todo += [producer(source) for source in node.inputs]
    return [node for node in graph.nodes if id(node) in found]
