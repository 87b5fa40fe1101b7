"""Learned affine transforms in a graph: the same function, folded where they can be, online elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from support.feeds import decoder_feeds
from support.graphs import graph_of, ops, run
from support.models import DIM, HEAD, HEADS, MLP, decoder
from support.transforms import invertible

from rotexport.graph.sites import linears
from rotexport.graph.weights import weight_of
from rotexport.passes.transform_heads import TransformKeys, TransformValues
from rotexport.passes.transform_inputs import TransformInputs
from rotexport.transforms.transform import (
    Diagonal,
    Identity,
    KroneckerPair,
    ScaledKronecker,
)

QKV, OUTPUT, GATE_UP, DOWN = ("0.query", "0.key", "0.value"), ("0.output",), ("0.gate", "0.up"), ("0.down",)


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


@pytest.mark.parametrize("gated", [True, False])
def test_the_function_stays(gated: bool) -> None:
    graph = graph_of(decoder(2, gated=gated))
    inputs = INPUTS if gated else {QKV: INPUTS[QKV], ("0.up",): INPUTS[GATE_UP], DOWN: INPUTS[DOWN]}
    feeds = decoder_feeds(graph, past=0)
    before = run(graph, **feeds)[0]
    assert TransformInputs(inputs).run(graph).changed > 0
    np.testing.assert_allclose(run(graph, **feeds)[0], before, rtol=2e-4, atol=2e-4)


def test_the_function_stays_with_transformed_values_and_keys_too() -> None:
    graph = graph_of(decoder(2))
    feeds = decoder_feeds(graph, past=0)
    before = run(graph, **feeds)[0]
    TransformValues({0: invertible(HEAD, 1), 1: invertible(HEAD, 2)}).run(graph)
    TransformKeys({0: ScaledKronecker(None, KroneckerPair(Identity(1), invertible(HEAD, 5)))}).run(graph)
    TransformInputs(INPUTS).run(graph)
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
