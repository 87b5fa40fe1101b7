"""Linears get their names from where their outputs go."""

import pytest
from support.graphs import graph_of
from support.models import decoder

from rotexport.graph.sites import linears
from rotexport.transforms.hadamard import Hadamard
from rotexport.transforms.matrices import OrthogonalMatrix
from rotexport.transforms.transform import Transform

GATED = ["query", "key", "value", "output", "gate", "up", "down"]
PLAIN = ["query", "key", "value", "output", "up", "down"]


@pytest.mark.parametrize(("gated", "roles"), [(True, GATED), (False, PLAIN)])
def test_every_linear_of_a_decoder_has_its_role(gated: bool, roles: list[str]) -> None:
    graph = graph_of(decoder(2, gated=gated))
    names = [linear.name for linear in linears(graph)]
    assert names == [f"{block}.{role}" for block in (0, 1) for role in roles] + ["head"]


def test_names_of_nodes_and_tensors_play_no_part() -> None:
    graph = graph_of(decoder(1))
    expected = [linear.name for linear in linears(graph)]
    for number, node in enumerate(graph.nodes):
        node.name = f"n{number}"
        for tensor in node.outputs:
            if tensor.name != "logits":
                tensor.name = f"t{number}"
    assert [linear.name for linear in linears(graph)] == expected


def test_a_fused_projection_is_one_site() -> None:
    graph = graph_of("""
    fused (float[1, 4, 6] x, float[6, 18] Wqkv, float[6, 6] Wo, float[1, 1, 4, 4] mask) => (float[1, 4, 6] y)
    <int64[3] sizes = {6, 6, 6}, int64[4] heads = {0, 0, 2, 3}, int64[3] flat = {0, 0, 6}> {
        qkv = MatMul(x, Wqkv)
        q, k, v = Split<axis = -1>(qkv, sizes)
        qr = Reshape(q, heads)
        kr = Reshape(k, heads)
        vr = Reshape(v, heads)
        q4 = Transpose<perm = [0, 2, 1, 3]>(qr)
        k4 = Transpose<perm = [0, 2, 1, 3]>(kr)
        v4 = Transpose<perm = [0, 2, 1, 3]>(vr)
        o4 = Attention(q4, k4, v4, mask)
        ot = Transpose<perm = [0, 2, 1, 3]>(o4)
        o = Reshape(ot, flat)
        m = MatMul(o, Wo)
        y = Add(x, m)
    }""")
    assert [linear.name for linear in linears(graph)] == ["0.qkv", "0.output"]


def test_a_product_of_two_activations_is_no_linear() -> None:
    graph = graph_of("product (float[2, 3] x, float[3, 2] y) => (float[2, 2] z) { z = MatMul(x, y) }")
    assert linears(graph) == []


@pytest.mark.parametrize(
    "transform", [OrthogonalMatrix.random(6, 0), Hadamard.of(6, block=2)], ids=["dense", "Hadamard"]
)
def test_a_rotation_that_runs_online_is_no_linear(transform: Transform) -> None:
    graph = graph_of("linear (float[2, 6] x, float[6, 2] W) => (float[2, 2] y) { y = MatMul(x, W) }")
    (before,) = linears(graph)
    nodes, rotated = transform.online_nodes("x.rotated", graph.inputs[0])
    before.node.inputs[0] = rotated
    graph.nodes += nodes
    graph.toposort()
    assert linears(graph) == [before]


def test_attention_and_mlp_in_parallel_belong_to_one_block() -> None:
    sequential = decoder(2, gated=False)
    parallel = sequential
    for n, stream in enumerate(("block__0__input", "block__0__output")):
        parallel = parallel.replace(
            f"b{n}_n2 = RMSNormalization<axis = -1>(b{n}_mid,",
            f"b{n}_n2 = RMSNormalization<axis = -1>({stream},",
        )
    assert parallel != sequential
    names = sorted(linear.name for linear in linears(graph_of(parallel)))
    assert names == sorted(linear.name for linear in linears(graph_of(sequential)))
