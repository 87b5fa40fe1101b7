"""What runs online equals what folds: every transform's nodes, in ONNX Runtime, against its dense form."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.graphs import run

from rotexport.transforms import online
from rotexport.transforms.constructions import sylvester
from rotexport.transforms.orders import base_matrix
from rotexport.transforms.transform import (
    BlockDiagonal,
    Composition,
    Diagonal,
    Hadamard,
    HeadMix,
    Identity,
    InvertibleMatrix,
    KroneckerPair,
    OrthogonalMatrix,
    Permutation,
    ScaledKronecker,
    Transform,
)

RNG = np.random.default_rng(0)
TRANSFORMS = [
    Identity(12),
    Hadamard(64, 64),
    Hadamard(576, 576, 1),
    Hadamard(96, 12, 2),
    Hadamard(28, 28).inverse(),
    Hadamard(56, 28, 3).inverse(),
    HeadMix(12, 5),
    HeadMix(12, 5).inverse(),
    OrthogonalMatrix.random(9, 4),
    InvertibleMatrix(RNG.standard_normal((7, 7))),
    Diagonal(RNG.uniform(0.5, 2, 6)),
    Permutation(RNG.permutation(11)),
    KroneckerPair(OrthogonalMatrix.random(3, 0), Hadamard(20, 20, 1)),
    ScaledKronecker(
        Diagonal(np.linspace(0.5, 2, 15)),
        KroneckerPair(InvertibleMatrix(np.triu(np.ones((3, 3)))), OrthogonalMatrix.random(5, 2)),
    ),
    ScaledKronecker(None, KroneckerPair(InvertibleMatrix(RNG.standard_normal((2, 2))), Identity(4))),
    BlockDiagonal(Hadamard(12, 12, 1), 3),
    Composition(
        (
            Diagonal(RNG.uniform(0.5, 2, 12)),
            Identity(12),
            Hadamard(12, 12, 5),
            Permutation(RNG.permutation(12)),
        )
    ),
]


def graph_of(transform: Transform, shape: list[str | int]) -> gs.Graph:
    x = gs.Variable("x", np.dtype(np.float32), [*shape, transform.size])
    nodes, y = transform.online_nodes("rotated", x)
    result = gs.Variable("y", np.dtype(np.float32), x.shape)
    nodes.append(gs.Node("Identity", "end", inputs=[y], outputs=[result]))
    return gs.Graph(nodes, [x], [result], opset=23, ir_version=11)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=Transform.describe)
@pytest.mark.parametrize("shape", [["rows"], ["batch", "heads", "sequence"]], ids=["2d", "4d"])
def test_online_nodes_compute_the_transform(transform: Transform, shape: list[str | int]) -> None:
    x = (
        np.random.default_rng(1)
        .standard_normal((*range(2, 2 + len(shape)), transform.size))
        .astype(np.float32)
    )
    (y,) = run(graph_of(transform, shape), x=x)
    expected = x @ transform.dense()
    # float32 products of up to 576 terms of unit size.
    np.testing.assert_allclose(y, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=Transform.describe)
def test_results_are_typed_shaped_and_named(transform: Transform) -> None:
    graph = graph_of(transform, ["batch", "sequence"])
    *nodes, end = graph.nodes
    result = end.inputs[0]
    assert result.name == ("rotated" if nodes else "x")
    assert (result.dtype, result.shape) == (np.float32, ["batch", "sequence", transform.size])
    names = [node.name for node in graph.nodes] + [t.name for n in nodes for t in n.outputs]
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)
    assert all(t.dtype is not None and t.shape is not None for n in nodes for t in [*n.inputs, *n.outputs])
    assert all(name.startswith(("rotated", "end")) for name in names)


def test_identity_costs_nothing() -> None:
    x = gs.Variable("x", np.dtype(np.float32), ["rows", 12])
    assert Identity(12).online_nodes("y", x) == ([], x)


def test_a_hadamard_is_one_operator_that_tensorrt_may_replace_by_a_kernel() -> None:
    x = gs.Variable("x", np.dtype(np.float16), ["rows", 1536])
    (node,), _ = Hadamard(1536, 1536, 1).online_nodes("y", x)
    assert (node.op, node.domain) == ("FastHadamard", "rotexport")
    assert node.attrs == {"plugin_namespace": "rotexport", "plugin_version": "1"}
    signs, base, hi, lo = (tensor.values for tensor in node.inputs[1:])
    assert signs.dtype == np.float16
    assert np.array_equal(base, base_matrix(12))
    assert np.array_equal(np.kron(hi, lo), sylvester(128))
    assert {base.dtype, hi.dtype, lo.dtype} == {np.dtype(np.int8)}


@pytest.mark.parametrize(
    ("m", "power", "hi"), [(1, 64, 1), (1, 4096, 64), (12, 128, 4), (172, 64, 1), (28, 512, 4), (12, 1, 1)]
)
def test_sylvesters_part_is_split_where_the_body_is_cheapest(m: int, power: int, hi: int) -> None:
    """The body multiplies [m p, m p] and [q, q] tables: m p + q operations per element; 64 is one product."""
    x = gs.Variable("x", np.dtype(np.float32), ["rows", m * power])
    (node,), _ = online.fast_hadamard("y", x, np.ones(m * power), np.ones((m, m)), power)
    tables = [len(tensor.values) for tensor in node.inputs[2:]]
    assert tables == [m, hi, power // hi]
