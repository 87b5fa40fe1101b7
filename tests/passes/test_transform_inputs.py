"""Learned affine transforms in a graph: the same function, folded where they can be, online elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from support.feeds import decoder_feeds
from support.graphs import graph_of, ops, run
from support.models import DIM, HEAD, HEADS, MLP, decoder

from rotexport.errors import GraphError
from rotexport.graph.basis import attention_nodes
from rotexport.graph.sites import linears
from rotexport.graph.weights import weight_of
from rotexport.passes.base import Where
from rotexport.passes.rotate_inputs import MixHeads
from rotexport.passes.transform_heads import TransformKeys, TransformValues
from rotexport.passes.transform_inputs import TransformInputs
from rotexport.transforms.transform import (
    Diagonal,
    Identity,
    InvertibleMatrix,
    KroneckerPair,
    ScaledKronecker,
)

QKV, OUTPUT, GATE_UP, DOWN = ("0.query", "0.key", "0.value"), ("0.output",), ("0.gate", "0.up"), ("0.down",)


def invertible(size: int, seed: int) -> InvertibleMatrix:
    rng = np.random.default_rng(seed)
    return InvertibleMatrix(rng.standard_normal((size, size)) + 2 * np.sqrt(size) * np.eye(size))


def scaled(left: int, right: int, seed: int) -> ScaledKronecker:
    scale = np.random.default_rng(seed).uniform(0.5, 2, left * right)
    return ScaledKronecker(
        Diagonal(scale), KroneckerPair(invertible(left, seed + 1), invertible(right, seed + 2))
    )


INPUTS = {
    QKV: scaled(2, DIM // 2, 0),
    OUTPUT: KroneckerPair(invertible(HEADS, 3), Identity(HEAD)),
    GATE_UP: scaled(2, DIM // 2, 4),
    DOWN: scaled(3, MLP // 3, 7),
}
PASSES = [
    TransformInputs(INPUTS),
    TransformValues({0: invertible(HEAD, 1), 1: invertible(HEAD, 2)}),
    TransformKeys({0: ScaledKronecker(None, KroneckerPair(Identity(1), invertible(HEAD, 5)))}),
]


@pytest.mark.parametrize("rewrite", PASSES, ids=lambda rewrite: rewrite.name)
@pytest.mark.parametrize("gated", [True, False])
def test_the_function_stays(rewrite, gated: bool) -> None:
    graph = graph_of(decoder(2, gated=gated))
    if not gated and isinstance(rewrite, TransformInputs):
        rewrite = TransformInputs({QKV: INPUTS[QKV], ("0.up",): INPUTS[GATE_UP], DOWN: INPUTS[DOWN]})
    feeds = decoder_feeds(graph, past=0)
    before = run(graph, **feeds)[0]
    report = rewrite.run(graph)
    assert report.changed > 0
    np.testing.assert_allclose(run(graph, **feeds)[0], before, rtol=2e-4, atol=2e-4)


def test_all_three_together_leave_the_function_as_it_is() -> None:
    graph = graph_of(decoder(2))
    feeds = decoder_feeds(graph, past=0)
    before = run(graph, **feeds)[0]
    for rewrite in (PASSES[1], PASSES[2], PASSES[0]):
        rewrite.run(graph)
    np.testing.assert_allclose(run(graph, **feeds)[0], before, rtol=5e-4, atol=5e-4)


def test_scales_go_into_norms_and_into_the_factor_of_a_product() -> None:
    graph = graph_of(decoder(1))
    norms = {node.name: weight_of(node.inputs[1]).read() for node in graph.nodes if "RMS" in node.op}
    up = {site.name: weight_of(site.weight).read() for site in linears(graph)}["0.up"]
    report = TransformInputs(INPUTS).run(graph)
    first, second, _ = (node for node in graph.nodes if "RMS" in node.op)
    for node, group in ((first, QKV), (second, GATE_UP)):
        expected = norms[node.name] * INPUTS[group].scale.values
        np.testing.assert_allclose(weight_of(node.inputs[1]).read(), expected, rtol=1e-6)
    online = [node for node in graph.nodes if node.op == "KroneckerTransform"]
    assert [tuple(node.inputs[1].shape) for node in online] == [(1,), (1,), (1,)]
    lowered = {site.name: weight_of(site.weight).read() for site in linears(graph)}["0.up"]
    alone = INPUTS[GATE_UP].contragredient().fold_into(up, 0)
    np.testing.assert_allclose(lowered, alone * INPUTS[DOWN].scale.values, rtol=1e-4, atol=1e-5)
    reasons = {placement.site: placement.reason for placement in report.placements}
    assert "folded into the norm" in reasons["0.query"] and "folded" in reasons["0.down"]
    assert "folded" not in reasons["0.output"]


def test_scales_stay_online_where_something_else_reads_the_tensor_or_nothing_takes_them_up() -> None:
    graph = graph_of(decoder(1, gated=False))
    TransformInputs({("0.query", "0.key"): INPUTS[QKV], DOWN: INPUTS[DOWN]}).run(graph)  # 0.value reads too
    online = [node for node in graph.nodes if node.op == "KroneckerTransform"]
    assert [tuple(node.inputs[1].shape) for node in online] == [(DIM,), (MLP,)]


def test_heads_are_mixed_by_one_product() -> None:
    graph = graph_of(decoder(1))
    before = ops(graph)
    TransformInputs({OUTPUT: INPUTS[OUTPUT]}).run(graph)
    added = [op for op in ops(graph) if op not in before] + ["MatMul"] * (
        ops(graph).count("MatMul") - before.count("MatMul")
    )
    assert added.count("MatMul") == 1 and "KroneckerTransform" not in added


def test_values_fold_without_a_node_and_the_cache_holds_them() -> None:
    graph = graph_of(decoder(2))
    nodes, feeds = ops(graph), decoder_feeds(graph, past=0)
    before = run(graph, **feeds)
    transform = invertible(HEAD, 1)
    report = TransformValues({1: transform}).run(graph)
    assert ops(graph) == nodes
    assert [(p.site, p.where) for p in report.placements] == [("1.value", Where.FOLDED)]
    after = run(graph, **feeds)
    names = [tensor.name for tensor in graph.outputs]
    for name, first, second in zip(names, before, after, strict=True):
        expected = transform.apply(first) if name == "present.1.value" else first
        np.testing.assert_allclose(second, expected, rtol=2e-4, atol=2e-4)


def test_the_cache_holds_transformed_keys_and_no_new_linear_appears() -> None:
    graph = graph_of(decoder(1))
    sites, feeds = [site.name for site in linears(graph)], decoder_feeds(graph, past=0)
    before = run(graph, **feeds)
    transform = ScaledKronecker(None, KroneckerPair(Identity(1), invertible(HEAD, 5)))
    TransformKeys({0: transform}).run(graph)
    after = run(graph, **feeds)
    place = [tensor.name for tensor in graph.outputs].index("present.0.key")
    np.testing.assert_allclose(after[place], transform.apply(before[place]), rtol=2e-4, atol=2e-4)
    assert [site.name for site in linears(graph)] == sites


def test_pinned_values_are_refused() -> None:
    graph = graph_of(decoder(1))
    MixHeads().run(graph)  # an online transform behind attention pins what it reads
    assert any(True for _ in attention_nodes(graph))
    with pytest.raises(GraphError, match="the values of block 0 cannot change their basis"):
        TransformValues({0: invertible(HEAD, 1)}).run(graph)
