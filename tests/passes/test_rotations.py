"""Rotated graphs compute what they computed, fold where they can, and say where not."""

import numpy as np
import pytest
from support.feeds import decoder_feeds
from support.graphs import graph_of, ops, run
from support.models import HEAD, decoder

from rotexport.graph.basis import analyse, residual
from rotexport.passes.base import Where
from rotexport.passes.fold_norms import FoldNorms
from rotexport.passes.rotate_heads import RotateHeads
from rotexport.passes.rotate_inputs import MixHeads, RotateDownInputs
from rotexport.passes.rotate_residual import RotateResidual
from rotexport.recipe import Rotation

PLAIN = Rotation("hadamard")
SIGNED = Rotation("random-hadamard", seed=3)
DENSE = Rotation("orthogonal", seed=3)
FOLDED_PASSES = [RotateResidual(r) for r in (PLAIN, SIGNED, DENSE)] + [
    RotateHeads(r, "r2") for r in (SIGNED, DENSE)
]
ONLINE_PASSES = [
    RotateHeads(SIGNED, "r3"),
    RotateDownInputs(PLAIN),
    RotateDownInputs(Rotation("hadamard", block=4)),
    MixHeads(),
]


def logits_before_and_after(graph, rotation):
    FoldNorms().run(graph)
    feeds = decoder_feeds(graph, past=0)
    before = run(graph, **feeds)[0]
    report = rotation.run(graph)
    return before, run(graph, **feeds)[0], report


@pytest.mark.parametrize("rotation", FOLDED_PASSES, ids=lambda p: f"{p.name}-{p.rotation.kind}")
def test_folded_rotations_add_no_nodes(rotation) -> None:
    graph = graph_of(decoder(2))
    FoldNorms().run(graph)
    nodes = ops(graph)
    before, after, report = logits_before_and_after(graph, rotation)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    assert ops(graph) == nodes
    assert {placement.where for placement in report.placements} == {Where.FOLDED}


@pytest.mark.parametrize("rotation", ONLINE_PASSES, ids=lambda p: p.name)
def test_online_rotations_are_undone_in_weights(rotation) -> None:
    graph = graph_of(decoder(2))
    nodes = len(graph.nodes)
    before, after, report = logits_before_and_after(graph, rotation)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    assert len(graph.nodes) > nodes
    assert len(report.placements) == 2
    assert {placement.where for placement in report.placements} == {Where.ONLINE}


def test_all_rotations_together_keep_the_function() -> None:
    graph = graph_of(decoder(2))
    FoldNorms().run(graph)
    feeds = decoder_feeds(graph, past=0)
    before = run(graph, **feeds)[0]
    for rotation in (
        RotateResidual(SIGNED),
        RotateHeads(SIGNED, "r2"),
        RotateHeads(PLAIN, "r3"),
        RotateDownInputs(PLAIN),
        MixHeads(),
    ):
        rotation.run(graph)
    np.testing.assert_allclose(run(graph, **feeds)[0], before, rtol=1e-4, atol=1e-4)


def test_the_stream_really_is_in_another_basis() -> None:
    graph = graph_of(decoder(1))
    FoldNorms().run(graph)
    feeds = decoder_feeds(graph)
    stream = graph.tensors()["block.0.output"]
    graph.outputs.append(stream)
    plain = run(graph, **feeds)[-1]
    transform = SIGNED.transform(plain.shape[-1])
    graph.outputs.remove(stream)
    RotateResidual(SIGNED).run(graph)
    graph.outputs.append(stream)
    np.testing.assert_allclose(run(graph, **feeds)[-1], plain @ transform.dense(), rtol=1e-4, atol=1e-4)


def test_keys_in_the_cache_are_rotated() -> None:
    graph = graph_of(decoder(1))
    feeds = decoder_feeds(graph, past=0)
    key = [tensor.name for tensor in graph.outputs].index("present.0.key")
    plain = run(graph, **feeds)[key]
    RotateHeads(PLAIN, "r3").run(graph)
    expected = plain @ PLAIN.transform(HEAD).dense()
    np.testing.assert_allclose(run(graph, **feeds)[key], expected, rtol=1e-4, atol=1e-5)


def test_r3_folds_where_no_rotary_embedding_stands_in_the_way() -> None:
    graph = graph_of(decoder(2, rope=False))
    before, after, report = logits_before_and_after(graph, RotateHeads(SIGNED, "r3"))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    assert {placement.where for placement in report.placements} == {Where.FOLDED}
    assert "FastHadamard" not in ops(graph)


def test_post_norms_take_the_residual_rotation_online() -> None:
    text = (
        decoder(1)
        .replace(
            "b0_mid = Add(block__0__input, b0_o)",
            """
    b0_post = RMSNormalization<axis = -1>(b0_o, Gamma0_post)
    b0_mid = Add(block__0__input, b0_post)""",
        )
        .replace("float[8] Gamma_final", "float[8] Gamma_final, float[8] Gamma0_post")
    )
    graph = graph_of(text)
    before, after, report = logits_before_and_after(graph, RotateResidual(SIGNED))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    assert report.placements[0].where is Where.ONLINE
    assert ops(graph).count("FastHadamard") == 1


def test_a_stream_pinned_by_something_else_is_refused_with_the_reason() -> None:
    graph = graph_of(
        decoder(1).replace(
            "block__0__output = Add(b0_mid, b0_down)",
            "b0_s = Add(b0_mid, b0_down)\nblock__0__output = Tanh(b0_s)",
        )
    )
    before, after, report = logits_before_and_after(graph, RotateResidual(SIGNED))
    assert report.changed == 0
    assert report.placements[0].where is Where.REFUSED
    assert "Tanh" in report.placements[0].reason
    np.testing.assert_array_equal(after, before)


def test_analysis_of_a_rotated_graph_still_finds_the_stream_free() -> None:
    graph = graph_of(decoder(2))
    FoldNorms().run(graph)
    RotateResidual(SIGNED).run(graph)
    assert residual(analyse(graph)).free
