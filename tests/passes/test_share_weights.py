"""Equal constants are stored once; a tied head stays its embedding."""

import numpy as np
from support.graphs import graph_of, ops, run

from rotexport.graph.weights import InMemory, Transposed, set_weight, weight_of
from rotexport.passes.share_weights import ShareWeights

TIED = """
tied (int64[1, 3] ids, float[7, 4] Table, float[4, 7] Head, float[4] S) => (float[1, 3, 7] logits) {
    x = Gather<axis = 0>(Table, ids)
    y = Mul(x, S)
    logits = MatMul(y, Head)
}"""


def test_a_head_that_is_the_transposed_embedding_reads_it() -> None:
    graph = graph_of(TIED)
    tensors = graph.tensors()
    set_weight(tensors["Head"], Transposed(InMemory(tensors["Table"].values)))
    ids = np.array([[1, 2, 6]])
    before = run(graph, ids=ids)[0]
    assert ShareWeights().run(graph).changed == 1
    assert ops(graph) == ["Gather", "Mul", "Transpose", "MatMul"]
    np.testing.assert_array_equal(run(graph, ids=ids)[0], before)


def test_a_head_of_its_own_stays() -> None:
    graph = graph_of(TIED)
    assert ShareWeights().run(graph).changed == 0
    assert ops(graph) == ["Gather", "Mul", "MatMul"]


def test_equal_vectors_are_one() -> None:
    graph = graph_of("""
    twice (float[2, 2] x) => (float[2, 2] z) <float[2] a = {1.0, 2.0}, float[2] b = {1.0, 2.0}, float[2] c = {1.0, 3.0}> {
        u = Add(x, a)
        v = Add(u, b)
        z = Add(v, c)
    }""")
    assert ShareWeights().run(graph).changed == 1
    first, second, third = (node.inputs[1] for node in graph.nodes)
    assert first is second
    assert weight_of(third) != weight_of(first)
