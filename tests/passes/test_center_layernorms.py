"""LayerNormalization becomes RMSNormalization when all that is summed up has zero mean."""

import numpy as np
from support.graphs import graph_of, ops, run

from rotexport.passes.center_layernorms import CenterLayerNorms

STREAM = """
stream (int64[2, 3] ids, int64[2, 3] positions, float[9, 4] Tokens, float[7, 4] Places, float[4] Gamma, float[4] Beta,
        float[4, 5] W1, float[5, 4] W2, float[4] B2, float[4] Gamma2, float[4] Beta2, float[4, 9] Head)
    => (float[2, 3, 9] logits) {
    t = Gather<axis = 0>(Tokens, ids)
    p = Gather<axis = 0>(Places, positions)
    x = Add(t, p)
    n = LayerNormalization<axis = -1, epsilon = 1e-5>(x, Gamma, Beta)
    a = MatMul(n, W1)
    r = Relu(a)
    m = MatMul(r, W2)
    d = Add(m, B2)
    y = Add(x, d)
    f = LayerNormalization<axis = -1, epsilon = 1e-5>(y, Gamma2, Beta2)
    logits = MatMul(f, Head)
}"""
FEEDS = {"ids": np.array([[1, 5, 8], [0, 2, 2]]), "positions": np.array([[0, 1, 2], [3, 4, 6]])}


def test_a_centred_stream_needs_no_means() -> None:
    graph = graph_of(STREAM)
    before = run(graph, **FEEDS)[0]
    assert CenterLayerNorms().run(graph).changed == 2
    assert "LayerNormalization" not in ops(graph)
    np.testing.assert_allclose(run(graph, **FEEDS)[0], before, rtol=1e-4, atol=1e-5)


def test_a_stream_that_is_also_read_without_a_norm_stays() -> None:
    graph = graph_of(
        STREAM.replace(
            "f = LayerNormalization<axis = -1, epsilon = 1e-5>(y, Gamma2, Beta2)", "f = Identity(y)"
        )
    )
    report = CenterLayerNorms().run(graph)
    assert report.changed == 0
    assert "LayerNormalization" in ops(graph)
    assert "also read without normalization" in report.notes[0]


def test_a_stream_through_a_nonlinearity_stays() -> None:
    graph = graph_of(STREAM.replace("x = Add(t, p)", "u = Add(t, p)\nx = Tanh(u)"))
    report = CenterLayerNorms().run(graph)
    assert report.changed == 0
    assert "Tanh" in report.notes[0]
