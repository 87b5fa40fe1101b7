"""The head's weight is multiplied by the map; what it was tied to is not."""

from __future__ import annotations

import numpy as np
import pytest
from support.feeds import decoder_feeds
from support.graphs import graph_of, parse, run
from support.models import DIM, decoder

from rotexport.errors import GraphError
from rotexport.graph.sites import linears
from rotexport.graph.weights import weight_of
from rotexport.passes.correct_head import CorrectHead

MATRIX = np.eye(DIM) + 0.1 * np.random.default_rng(0).standard_normal((DIM, DIM))


def test_logits_are_those_of_mapped_states() -> None:
    graph = graph_of(decoder(1))
    feeds = decoder_feeds(graph, past=0)
    head = next(site for site in linears(graph) if site.role == "head")
    weight = weight_of(head.weight).read()
    before = run(graph, **feeds)[0]
    assert CorrectHead(MATRIX).run(graph).changed == 1
    states = before @ np.linalg.pinv(weight)  # the head is wider than its inputs
    np.testing.assert_allclose(run(graph, **feeds)[0], states @ MATRIX @ weight, rtol=1e-3, atol=1e-3)


def test_an_embedding_that_is_the_heads_weight_too_stays() -> None:
    graph = parse("""
        tied (int64[1, t] ids) => (float[1, t, 2] logits) <float[2, 2] table = {1, 2, 3, 4}>
        { x = Gather <axis = 0> (table, ids)
          logits = MatMul (x, table) }
    """)
    CorrectHead(np.array([[1.0, 1.0], [0.0, 1.0]])).run(graph)
    result = run(graph, ids=np.array([[0, 1]]))[0]
    np.testing.assert_allclose(result[0], [[1, 2], [3, 4]] @ np.array([[4, 6], [3, 4]]))


def test_a_graph_without_a_head_is_refused() -> None:
    graph = parse("""
        bare (float[1, t, 2] x) => (float[1, t, 2] logits) { logits = Relu (x) }
    """)
    with pytest.raises(GraphError, match="there is no head to correct"):
        CorrectHead(np.eye(2)).run(graph)
