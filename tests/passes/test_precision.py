"""Narrowing touches activations, not positions."""

import ml_dtypes
import numpy as np
from support.feeds import decoder_feeds
from support.graphs import graph_of, ops, run
from support.models import decoder

from rotexport.passes.precision import SetPrecision

HALF = np.dtype(np.float16)


def test_half_precision_is_close_and_logits_stay_float32() -> None:
    graph = graph_of(decoder(2))
    feeds = decoder_feeds(graph, past=0)
    before = run(graph, **feeds)[0]
    SetPrecision(HALF).run(graph)
    after = run(graph, **decoder_feeds(graph, past=0))[0]
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, rtol=0, atol=0.02 * np.abs(before).max())
    assert {tensor.dtype for tensor in graph.inputs if tensor.name.startswith("past")} == {HALF}


def test_rotary_angles_stay_float32_until_activations_meet_them() -> None:
    graph = graph_of(
        """
    rope (float[1, 3] positions, float[1, 2, 3, 4] past_key_values__0__key, int64[1, 3] ids)
        => (float[1, 2, 3, 4] present__0__key) <float f = {0.5}, int64[4] heads = {0, 0, 2, 2}> {
        angle = Mul(positions, f)
        c = Cos(angle)
        s = Sin(angle)
        cu = Unsqueeze(c, axes)
        su = Unsqueeze(s, axes)
        present__0__key = RotaryEmbedding(past_key_values__0__key, cu, su)
    }""".replace("<float f", "<int64[1] axes = {2}, float f")
    )
    positions = next(tensor for tensor in graph.inputs if tensor.name == "positions")
    graph.inputs.remove(positions)
    positions.to_constant(np.array([[0, 1, 2]], np.float32))
    SetPrecision(HALF).run(graph)
    tensors = graph.tensors()
    assert tensors["c"].dtype == tensors["angle"].dtype == np.float32
    assert ops(graph).count("Cast") == 2
    assert tensors["present.0.key"].dtype == HALF


def test_float32_changes_nothing() -> None:
    graph = graph_of(decoder(1))
    assert SetPrecision(np.dtype(np.float32)).run(graph).changed == 0


def test_bfloat16_weights_are_rounded_once() -> None:
    graph = graph_of(decoder(1))
    before = graph.tensors()["W0_q"].values
    SetPrecision(np.dtype(ml_dtypes.bfloat16)).run(graph)
    after = next(node for node in graph.nodes if node.name == "b0_qf").inputs[1].values
    np.testing.assert_array_equal(after, before.astype(ml_dtypes.bfloat16))
