"""R3 inside attention: the same function without a node for it, where a kernel could do as much."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.graphs import run
from support.tiny import tiny_model

from rotexport.checkpoint import open_checkpoint
from rotexport.export import export
from rotexport.graph.edit import producer, sort
from rotexport.graph.functions import load_function
from rotexport.passes.fuse_key_rotations import ROTATABLE, FuseKeyRotations
from rotexport.passes.rotate_heads import RotateHeads
from rotexport.passes.stream_attention import StreamAttention
from rotexport.recipe import Rotation
from rotexport.streaming.cache import CacheFormat
from rotexport.streaming.scheme import AttentionScheme

SINKS, WINDOW, BATCH, TOKENS, HEAD = 2, 12, 2, 7, 8


def streaming(
    stored: CacheFormat, block: int | None = None, sinks: int = SINKS, *, rotate: bool = True
) -> gs.Graph:
    """Return a decoder of two blocks with R3 online, over a bounded cache."""
    graph = export(open_checkpoint(tiny_model("llama")))
    if rotate:
        RotateHeads(Rotation("random-hadamard", seed=3, block=block), "r3").run(graph)
    rng = np.random.default_rng(0)
    means = {number: rng.standard_normal((2, HEAD)) for number in range(2)} if stored.center else None
    StreamAttention(AttentionScheme("streaming", sinks, WINDOW), stored, means).run(graph)
    sort(graph)
    return graph


def feeds(graph: gs.Graph) -> dict[str, np.ndarray]:
    """Return a call over a cache of earlier tokens, whatever they were."""
    rng = np.random.default_rng(0)
    sizes = {"batch": BATCH, "sequence": TOKENS, "logit_count": 1}
    made = {}
    for tensor in graph.inputs:
        shape = [sizes.get(size, size) for size in tensor.shape]
        made[tensor.name] = (
            rng.integers(-8, 8, shape, np.int8)
            if tensor.dtype == np.int8
            else (0.3 * rng.standard_normal(shape)).astype(tensor.dtype)
        )
    made["input_ids"] = rng.integers(0, 96, (BATCH, TOKENS))
    made |= {"past_length": np.int32([20, 5]), "new_length": np.int32([TOKENS, TOKENS - 2])}
    made["logit_index"] = np.full((BATCH, 1), TOKENS - 3)
    return made


def rotations(graph: gs.Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes if node.domain == "rotexport")


@pytest.mark.parametrize(
    ("stored", "sinks", "removed"),
    [
        (CacheFormat(8), SINKS, 3),
        (CacheFormat(4, recent=4), SINKS, 3),
        (CacheFormat(2), 0, 2),
        (CacheFormat(8, center=True), SINKS, 3),
        (CacheFormat(4, recent=4, center=True), 0, 2),
    ],
    ids=["int8", "int4 and recent tokens", "int2 without sinks", "centered", "centered without sinks"],
)
def test_attention_rotates_what_nodes_rotated(stored: CacheFormat, sinks: int, removed: int) -> None:
    """Without sinks one node serves both queries."""
    graph = streaming(stored, sinks=sinks)
    before = run(graph, **feeds(graph))
    operator = f"{stored.operator}"
    assert rotations(graph) == {"FastHadamard": 2 * removed, operator: 2}
    report = FuseKeyRotations().run(graph)
    assert report.changed == 2 and report.notes == ["2 attentions rotate queries and keys themselves"]
    assert rotations(graph) == {f"{operator}Rotated": 2}
    for one, other in zip(run(graph, **feeds(graph)), before, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def unchanged(graph: gs.Graph) -> bool:
    before = rotations(graph)
    return FuseKeyRotations().run(graph).changed == 0 and rotations(graph) == before


def test_what_a_kernel_would_not_do_keeps_its_nodes() -> None:
    """Blocks shorter than a head, a float window; or there is nothing to rotate."""
    assert unchanged(streaming(CacheFormat(4), block=4))
    assert unchanged(streaming(CacheFormat()))
    assert unchanged(streaming(CacheFormat(4), rotate=False))


def test_rotations_that_differ_or_are_read_elsewhere_stay() -> None:
    graph = streaming(CacheFormat(4))
    first, second = (node for node in graph.nodes if node.op in ROTATABLE)
    key = producer(first.inputs[3])
    key.inputs[1] = gs.Constant("other.signs", -key.inputs[1].values)
    graph.outputs.append(second.inputs[1])
    reader = gs.Variable("copy", np.float32, second.inputs[1].shape)
    graph.nodes.append(gs.Node("Identity", "elsewhere", {}, [second.inputs[1]], [reader]))
    assert unchanged(graph)


@pytest.mark.parametrize("operator", ROTATABLE)
def test_every_operator_has_its_rotated_form(operator: str) -> None:
    """The same attributes, and the tables of the rotation behind its inputs."""
    plain, rotated = load_function(operator), load_function(f"{operator}Rotated")
    assert list(rotated.attribute) == list(plain.attribute)
    assert list(rotated.input) == [*plain.input, "signs", "base", "hi", "lo"]
    assert list(rotated.output) == list(plain.output)
