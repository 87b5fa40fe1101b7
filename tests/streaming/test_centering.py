"""Mean keys, and what centering on them is good for."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from support.builds import SINKS, WINDOW
from support.graphs import run as run_graph
from support.tiny import tiny_model

from rotexport.checkpoint import open_checkpoint
from rotexport.errors import GraphError, RecipeError
from rotexport.export import export
from rotexport.graph.basis import attention_nodes, new_key
from rotexport.graph.positions import Positions
from rotexport.passes.lasting_positions import LastingPositions
from rotexport.passes.rotate_heads import RotateHeads
from rotexport.passes.stream_attention import StreamAttention
from rotexport.recipe import Rotation
from rotexport.streaming.cache import CacheFormat
from rotexport.streaming.centering import key_path, mean_keys
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


@pytest.mark.parametrize(("kind", "fields"), [("llama", {}), ("phi3", {"partial_rotary_factor": 0.5})])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_mean_turns_as_keys_do(kind: str, fields: dict[str, float], rotated: bool) -> None:
    """If every token's key is the mean, centered keys are nothing, wherever they stand."""
    graph = export(open_checkpoint(tiny_model(kind, **fields)))
    if rotated:
        RotateHeads(Rotation("random-hadamard"), "r3").run(graph)
    positions = Positions(graph)
    for _, node in attention_nodes(graph):
        path = key_path(positions, new_key(node))
        mean = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
        table, constant = path.mean_map(mean)
        assert constant == (kind == "phi3"), "half of its channels stand still"
        key, source, angles = path.key, path.source, path.angles
        chain = [key.inputs[0]]
        while not any(tensor is source for tensor in chain[0].inputs):
            chain.insert(0, chain[0].inputs[0].inputs[0])
        part = gs.Graph(chain, [source, *angles], [key], opset=23)
        place = np.array([0, 7, 1000])
        turns = np.outer(place, 10000.0 ** -(np.arange(angles[0].shape[2]) / angles[0].shape[2]))
        found = [np.cos(turns), np.sin(turns)]
        feeds = {t.name: f[None].astype(np.float32) for t, f in zip(angles, found, strict=True)}
        keys = run_graph(part, **{source.name: np.broadcast_to(mean[None, :, None], (1, 2, 3, 8)), **feeds})
        rows = np.concatenate([*found, np.ones((3, 1))][: 3 if constant else 2], axis=1)
        np.testing.assert_allclose(np.einsum("hdr,nr->hnd", table, rows), keys[0][0], atol=1e-5)


def test_centered_keys_take_smaller_steps() -> None:
    offset = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 8
    keys = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)) + offset
    plain = (quantize(keys, 2, 16).values() - keys).square().mean()
    centered = (quantize(keys - offset, 2, 16).values() + offset - keys).square().mean()
    assert centered < plain / 10


def test_every_layer_needs_a_mean() -> None:
    graph = export(open_checkpoint(tiny_model("llama")))
    stored = CacheFormat(2, 4, center=True)
    with pytest.raises(GraphError, match="layer 0 has no calibrated mean"):
        StreamAttention(AttentionScheme("streaming", SINKS, WINDOW), stored).run(graph)


def stream_logits(graph: gs.Graph, tokens: np.ndarray, calls: list[int]) -> np.ndarray:
    """Feed tokens call by call; return all logits."""
    zeros = {
        t.name: np.zeros([1, *t.shape[1:]], t.dtype) for t in graph.inputs if t.name.startswith("cache.")
    }
    caches, found, past = list(zeros.values()), [], 0
    for size in calls:
        call = {
            "input_ids": tokens[None, past : past + size],
            "logit_index": np.arange(size)[None],
            "past_length": np.full(1, past, np.int32),
            "new_length": np.full(1, size, np.int32),
        }
        logits, *caches = run_graph(graph, **call, **dict(zip(zeros, caches, strict=True)))
        found.append(logits[0])
        past += size
    return np.concatenate(found)


@pytest.mark.parametrize(("kind", "recent"), [("llama", 3), ("gemma3_text", 0), ("phi3", 0)])
def test_any_mean_changes_little_at_eight_bits(kind: str, recent: int) -> None:
    """What is subtracted is added back, at every position and in every chunking, after the ring has turned."""
    fields = {"partial_rotary_factor": 0.5} if kind == "phi3" else {}
    tokens = np.random.default_rng(0).integers(0, 96, 40)
    outputs = []
    exported = export(open_checkpoint(tiny_model(kind, **fields)))
    RotateHeads(Rotation("hadamard"), "r3").run(exported)
    for center in (False, True):
        graph = exported.copy()
        means = {n: np.random.default_rng(n).standard_normal((2, 8)) for n in range(2)}
        stored = CacheFormat(8, None, recent, center)
        StreamAttention(AttentionScheme("streaming", SINKS, WINDOW), stored, means).run(graph)
        LastingPositions().run(graph)
        outputs.append(stream_logits(graph, tokens, [20, 1, 1, 18]))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=0.02 * np.abs(outputs[0]).max())
    assert np.abs(outputs[1] - outputs[0]).max() > 0


def test_the_right_mean_takes_the_place_of_bits() -> None:
    """Keys with one large common part: at two bits a centered cache is nearer the float one."""
    model = tiny_model("llama", attention_bias=True)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=20.0)
    biases = {
        n: layer.self_attn.k_proj.bias.detach().numpy().reshape(2, 8)
        for n, layer in enumerate(model.model.layers)
    }
    tokens = np.random.default_rng(0).integers(0, 96, 60)
    results = {}
    exported = export(open_checkpoint(model))
    for stored in (CacheFormat(), CacheFormat(2, 4), CacheFormat(2, 4, center=True)):
        graph = exported.copy()
        StreamAttention(AttentionScheme("streaming", SINKS, WINDOW), stored, biases).run(graph)
        results[stored.operator] = stream_logits(graph, tokens, [12] * 5)
    exact = results["SinkWindowAttention"]
    plain, centered = (
        np.abs(results[f"SinkWindowAttentionInt2{n}"] - exact).mean() for n in ("", "Centered")
    )
    assert centered < 0.8 * plain, "what is left comes from values, at two bits in both"
