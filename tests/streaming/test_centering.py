"""Mean keys, and what centering on them is good for."""

import numpy as np
import pytest
from support.builds import SINKS, WINDOW
from support.graphs import run as run_graph
from support.tiny import tiny_model

from rotexport.checkpoint import open_checkpoint
from rotexport.errors import GraphError, RecipeError
from rotexport.export import export
from rotexport.passes.stream_attention import StreamAttention
from rotexport.streaming.cache import CacheFormat
from rotexport.streaming.centering import mean_keys
from rotexport.streaming.oracle import quantize
from rotexport.streaming.scheme import AttentionScheme

KEYS = np.random.default_rng(0).standard_normal((2, 2, 9, 8))  # layers, heads, tokens, channels


def runner(windows, names):
    for number, window in enumerate(windows):
        yield {name: KEYS[None, layer, :, : window.size] + number for layer, name in enumerate(names)}


def test_sinks_do_not_count() -> None:
    graph = export(open_checkpoint(tiny_model("llama")))
    means = mean_keys(graph, runner, [np.arange(9), np.arange(6)], sinks=2)
    for layer, mean in means.items():
        tokens = np.concatenate([KEYS[layer, :, 2:9], KEYS[layer, :, 2:6] + 1], axis=1)
        np.testing.assert_allclose(mean, tokens.mean(axis=1), rtol=1e-6)
    with pytest.raises(RecipeError, match="longer than the 9 sinks"):
        mean_keys(graph, runner, [np.arange(9)], sinks=9)


def test_names_are_tensors_of_the_graph() -> None:
    graph = export(open_checkpoint(tiny_model("llama")))
    seen: list[str] = []

    def note(windows, names):
        seen.extend(names)
        return runner(windows, names)

    mean_keys(graph, note, [np.arange(9)], sinks=0)
    assert all(graph.tensors()[name].shape[1:] == [2, "sequence", 8] for name in seen)


def test_centered_keys_take_smaller_steps() -> None:
    import torch

    offset = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 8
    keys = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)) + offset
    plain = (quantize(keys, 2, 16).values() - keys).square().mean()
    centered = (quantize(keys - offset, 2, 16).values() + offset - keys).square().mean()
    assert centered < plain / 10


def test_every_layer_needs_a_mean() -> None:
    graph = export(open_checkpoint(tiny_model("llama")))
    stored = CacheFormat(2, 4, recent=3, center=True)
    with pytest.raises(GraphError, match="layer 0 has no calibrated mean"):
        StreamAttention(AttentionScheme("streaming", SINKS, WINDOW), stored).run(graph)


def test_the_mean_changes_little_at_eight_bits_and_reaches_the_operator() -> None:
    model = tiny_model("llama")
    outputs = []
    tokens = np.random.default_rng(0).integers(0, 96, 30)
    for center in (False, True):
        graph = export(open_checkpoint(model))
        means = {0: np.full((2, 8), 0.25), 1: np.full((2, 8), -0.25)}
        stored = CacheFormat(8, None, recent=3, center=center)
        StreamAttention(AttentionScheme("streaming", SINKS, WINDOW), stored, means).run(graph)
        node = next(node for node in graph.nodes if node.op == "SinkWindowAttentionInt8Recent")
        assert (node.inputs[8].values == (0.25 if center else 0)).all()
        known = {"input_ids": tokens[None], "logit_index": np.arange(30)[None]}
        lengths = {"past_length": np.zeros(1, np.int32), "new_length": np.full(1, 30, np.int32)}
        feeds = {
            t.name: (known | lengths).get(
                t.name, np.zeros([1, *[d if isinstance(d, int) else 1 for d in t.shape[1:]]], t.dtype)
            )
            for t in graph.inputs
        }
        outputs.append(run_graph(graph, **feeds)[0])
    np.testing.assert_allclose(outputs[1], outputs[0], atol=0.02 * np.abs(outputs[0]).max())
