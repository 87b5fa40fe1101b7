"""Canonical rewrites, on ONNX text."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.graphs import ops, parse, run

from rotexport.errors import UnsupportedModelError
from rotexport.export.canonical import canonicalize

FLATTENED = """
flattened (float[batch, sequence, 4] x, float[4, 6] up, float[6] bias, float[6, 4] down)
    => (float[batch, sequence, 4] y)
<int64[2] rows = {-1, 4}>
{
    shape = Shape(x)
    flat = Reshape(x, rows)
    wide = Gemm(flat, up, bias)
    active = MIDDLE(wide)
    narrow = MatMul(active, down)
    sum = Add(flat, narrow)
    y = Reshape(sum, shape)
}"""


def flattened(middle: str) -> gs.Graph:
    graph = parse(FLATTENED.replace("MIDDLE", middle))
    tensors = graph.tensors()
    for name in ("flat", "wide", "active", "narrow", "sum"):
        width = 6 if name in ("wide", "active") else 4
        tensors[name].shape, tensors[name].dtype = ["batch*sequence", width], np.float32
    return graph


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 3, 4), "up": (4, 6), "bias": (6,), "down": (6, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_rows_are_not_flattened_around_a_feed_forward_part() -> None:
    expected = run(flattened("Relu"), **feeds())
    graph = flattened("Relu")
    canonicalize(graph)
    # The output keeps its name, so its reshape stays, now without effect.
    assert ops(graph) == ["MatMul", "Add", "Relu", "MatMul", "Add", "Reshape"]
    assert list(graph.tensors()["active"].shape) == ["batch", "sequence", 6]
    np.testing.assert_allclose(run(graph, **feeds())[0], expected[0], atol=1e-5)


def test_joined_heads_stay_rows() -> None:
    graph = parse("""
        joined (float[batch, sequence, 2, 4] heads, float[8, 6] w) => (float[batch, sequence, 6] y)
        <int64[2] rows = {-1, 8}>
        {
            flat = Reshape(heads, rows)
            product = MatMul(flat, w)
            shape = Shape<start = 0, end = 2>(heads)
            width = Constant<value_ints = [6]>()
            sizes = Concat<axis = 0>(shape, width)
            y = Reshape(product, sizes)
        }""")
    for name, columns in (("flat", 8), ("product", 6)):
        graph.tensors()[name].shape, graph.tensors()[name].dtype = ["rows", columns], np.float32
    canonicalize(graph)
    join = graph.nodes[0]
    np.testing.assert_array_equal(join.inputs[1].values, [0, 0, 8])
    assert list(graph.tensors()["product"].shape) == ["batch", "sequence", 6]


def test_rows_stay_flat_where_an_operator_mixes_them() -> None:
    graph = flattened("Softmax<axis = 0>")
    canonicalize(graph)
    assert list(graph.tensors()["active"].shape) == ["batch*sequence", 6]
    np.testing.assert_allclose(
        run(graph, **feeds())[0], run(flattened("Softmax<axis = 0>"), **feeds())[0], atol=1e-5
    )


def test_a_reshape_by_measured_sizes_takes_constants() -> None:
    graph = parse("""
        split (float[batch, sequence, 8] input_ids) => (float[batch, sequence, 2, 4] y)
        <int64[2] heads = {2, 4}>
        {
            leading = Shape<start = 0, end = 2>(input_ids)
            shape = Concat<axis = 0>(leading, heads)
            y = Reshape<allowzero = 1>(input_ids, shape)
        }""")
    canonicalize(graph)
    (reshape,) = graph.nodes
    np.testing.assert_array_equal(reshape.inputs[1].values, [0, 0, 2, 4])
    assert "allowzero" not in reshape.attrs


def test_sizes_are_measured_on_the_inputs_of_the_model() -> None:
    graph = parse("""
        sizes (int64[batch, sequence] input_ids, float[batch, 2, past, 4] cache) => (int64[1] n, int64[1] p)
        {
            n = Shape<start = 0, end = 1>(cache)
            p = Shape<start = 2, end = 3>(cache)
        }""")
    canonicalize(graph)
    batch, past = graph.nodes
    assert (batch.inputs[0].name, batch.attrs["start"]) == ("input_ids", 0)
    assert (past.inputs[0].name, past.attrs["start"]) == ("cache", 2)  # no input measures the past itself


def test_what_changes_nothing_is_gone_and_what_changes_something_stays() -> None:
    graph = parse("""
        casts (float[2] x, bool[2] mask) => (double[2] y, bool[2] z)
        <bool always = {1}>
        {
            same = Cast<to = 1>(x)
            copy = Identity(same)
            y = Cast<to = 11>(copy)
            both = And(always, mask)
            z = Not(both)
        }""")
    canonicalize(graph)
    assert ops(graph) == ["Cast", "Not"]


def test_routing_is_refused_by_name() -> None:
    graph = parse("""
        router (float[2, 8] x, int64[1] k) => (float[2, 2] v, int64[2, 2] i)
        { v, i = TopK(x, k) }""")
    with pytest.raises(UnsupportedModelError, match="'TopK'"):
        canonicalize(graph)
