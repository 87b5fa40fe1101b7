"""Norm scales move into the matrices behind them."""

import numpy as np
from support.feeds import decoder_feeds
from support.graphs import graph_of, ops, run
from support.models import decoder

from rotexport.passes.fold_norms import FoldNorms

NORM = """
norm (float[2, 3, 4] x, float[4] Gamma, float[4] Beta, float[4, 5] W1, float[4, 6] W2, float[6] Bias)
    => (float[2, 3, 5] y, float[2, 3, 6] z) {
    n = RMSNormalization<axis = -1>(x, Gamma)
    s = %s
    y = MatMul(s, W1)
    m = MatMul(s, W2)
    z = Add(m, Bias)
}"""


def test_a_scale_folds_into_every_reader() -> None:
    graph = graph_of(decoder(2))
    feeds = decoder_feeds(graph)
    before = run(graph, **feeds)
    assert FoldNorms().run(graph).changed == 5
    for old, new in zip(before, run(graph, **feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)
    for node in graph.nodes:
        if node.op == "RMSNormalization":
            assert (node.inputs[1].values == 1).all()


def test_a_shift_becomes_a_bias_or_joins_the_one_that_is_there() -> None:
    graph = graph_of(NORM % "Add(n, Beta)")
    x = np.random.default_rng(3).standard_normal((2, 3, 4)).astype(np.float32)
    before = run(graph, x=x)
    FoldNorms().run(graph)
    assert ops(graph) == ["RMSNormalization", "MatMul", "Add", "MatMul", "Add"]
    for old, new in zip(before, run(graph, x=x), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_a_norm_that_other_nodes_read_keeps_its_scale() -> None:
    graph = graph_of(NORM % "Sigmoid(n)")
    report = FoldNorms().run(graph)
    assert report.changed == 0
    assert report.notes == ["n keeps its scale: not only matrices read it"]
    assert not (graph.nodes[0].inputs[1].values == 1).all()
