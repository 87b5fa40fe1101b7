"""Learned maps of keys and values: the same function, and a cache that holds what was transformed."""

from __future__ import annotations

import numpy as np
import pytest
from support.feeds import decoder_feeds
from support.graphs import graph_of, ops, run
from support.models import HEAD, decoder
from support.transforms import invertible

from rotexport.errors import GraphError
from rotexport.graph.basis import attention_nodes
from rotexport.graph.sites import linears
from rotexport.passes.base import Where
from rotexport.passes.rotate_inputs import MixHeads
from rotexport.passes.transform_heads import TransformKeys, TransformValues
from rotexport.transforms.transform import Identity, KroneckerPair, ScaledKronecker

PASSES = [
    TransformValues({0: invertible(HEAD, 1), 1: invertible(HEAD, 2)}),
    TransformKeys({0: ScaledKronecker(None, KroneckerPair(Identity(1), invertible(HEAD, 5)))}),
]


@pytest.mark.parametrize("rewrite", PASSES, ids=lambda rewrite: rewrite.name)
@pytest.mark.parametrize("gated", [True, False])
def test_the_function_stays(rewrite, gated: bool) -> None:
    graph = graph_of(decoder(2, gated=gated))
    feeds = decoder_feeds(graph, past=0)
    before = run(graph, **feeds)[0]
    assert rewrite.run(graph).changed > 0
    np.testing.assert_allclose(run(graph, **feeds)[0], before, rtol=2e-4, atol=2e-4)


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
