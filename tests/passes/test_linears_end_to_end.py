"""A whole decoder with QuantizedLinear operators computes what it computes with standard nodes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.graphs import run
from support.tiny import tiny_model

from rotexport.checkpoint import open_checkpoint
from rotexport.export import export
from rotexport.graph.edit import sort
from rotexport.passes.place_linears import PlaceLinears
from rotexport.passes.quantize_activations import QuantizeActivations
from rotexport.passes.quantize_weights import QuantizeWeights
from rotexport.pipeline import Pipeline, plan_sites, rotation_passes
from rotexport.quant.operators import with_operators
from rotexport.recipe import load_recipe

BATCH, TOKENS, PAST = 2, 9, 3


@pytest.fixture(scope="module")
def exported() -> gs.Graph:
    """Return a model whose every width holds two groups of 64."""
    model = tiny_model("qwen2", hidden_size=128, intermediate_size=256)  # with biases on query, key and value
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return export(open_checkpoint(model))


def feeds(graph: gs.Graph) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"batch": BATCH, "sequence": TOKENS, "past": PAST, "total": PAST + TOKENS}
    made = {}
    for tensor in graph.inputs:
        shape = [sizes.get(size, size) for size in tensor.shape]
        made[tensor.name] = (0.3 * rng.standard_normal(shape)).astype(tensor.dtype)
    made["input_ids"] = rng.integers(0, 96, (BATCH, TOKENS))
    made["attention_mask"] = np.ones((BATCH, PAST + TOKENS), np.int64)
    made["position_ids"] = np.tile(np.arange(PAST, PAST + TOKENS), (BATCH, 1))
    return made


@pytest.mark.parametrize(
    ("recipe", "operators"),
    [
        ("quarot-w4a8", {"W4A8TwoLevel": 8, "W4A8TwoLevelGated": 2, "W4A8TwoLevelResidual": 4}),
        ("quarot-w4a4kv4", {"W4A4": 8, "W4A4Gated": 2, "W4A4Residual": 4}),
        ("w8a8-dynamic", {"W8A8": 8, "W8A8Gated": 2, "W8A8Residual": 4}),
    ],
)
def test_two_blocks_compute_the_same(exported: gs.Graph, recipe: str, operators: dict[str, int]) -> None:
    """Query, key and value read one quantized input, gate and up another; residuals and gates are absorbed.

    Sums differ by rounding. A value within that of a tie between two codes would get the other code, and move
    the logits that depend on it by hundredths of their standard deviation.
    """
    graph, loaded = exported.copy(), load_recipe(recipe)
    plan = plan_sites(graph, loaded)
    Pipeline(graph, None).run(rotation_passes(loaded.rotations), lambda name: None)
    QuantizeWeights(plan).run(graph)
    plain = graph.copy()
    QuantizeActivations(plan, {}).run(plain)
    PlaceLinears(with_operators(plan)).run(graph)
    for one in (graph, plain):
        sort(one)
    found = Counter(node.op for node in graph.nodes if node.domain == "rotexport")
    linears = {name.removeprefix("QuantizedLinear"): n for name, n in found.items() if "Linear" in name}
    assert linears == operators
    assert sum(n for name, n in found.items() if name.startswith("FastHadamardInt")) == 4 * 2
    logits, expected = (run(one, **feeds(one))[0] for one in (graph, plain))
    difference = np.abs(logits - expected) / expected.std()
    assert np.median(difference) < 1e-5 and difference.max() < 0.1
