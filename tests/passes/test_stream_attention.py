"""Attention swapped for a bounded cache: the same model within the window, StreamingLLM beyond it."""

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from support.builds import SINKS, WINDOW, streaming_graph
from support.graphs import ops, run
from support.tiny import tiny_model
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.llama import modeling_llama

from rotexport.checkpoint import open_checkpoint
from rotexport.errors import GraphError, UnsupportedModelError
from rotexport.export import export
from rotexport.graph.masks import mask_window
from rotexport.passes.rotate_heads import RotateHeads
from rotexport.passes.stream_attention import StreamAttention
from rotexport.recipe import Rotation
from rotexport.streaming.cache import CacheFormat
from rotexport.streaming.eviction import Eviction
from rotexport.streaming.oracle import Definition, Row, attend
from rotexport.streaming.scheme import AttentionScheme

TOKENS = np.random.default_rng(0).integers(0, 96, 40)
STREAMING = AttentionScheme("streaming", SINKS, WINDOW)


def feeds(graph: gs.Graph, tokens: np.ndarray, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the first call of a stream, all logits asked for."""
    count = len(tokens)
    known = {
        "input_ids": tokens[None],
        "logit_index": np.arange(count)[None],
        "past_length": np.zeros(1, np.int32),
        "new_length": np.full(1, count, np.int32),
        **changes,
    }
    return {
        t.name: known[t.name] if t.name in known else np.zeros([1, *t.shape[1:]], t.dtype)
        for t in graph.inputs
    }


def logits(graph: gs.Graph, tokens: np.ndarray, **changes: np.ndarray) -> np.ndarray:
    return run(graph, **feeds(graph, tokens, **changes))[0][0]


def reference(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens[None])).logits[0].numpy()


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "qwen2"])
def test_within_the_window_logits_are_the_models(kind: str) -> None:
    model = tiny_model(kind)
    assert_close(logits(streaming_graph(model), TOKENS[:WINDOW]), reference(model, TOKENS[:WINDOW]))


@pytest.fixture
def streaming_llm(monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel, np.ndarray], np.ndarray]:
    """PyTorch's own Llama under the definition: queries rotated twice, the mask explicit."""

    def apply(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
        definition = Definition(SINKS, WINDOW, scale=8**-0.5)
        rotate = modeling_llama.apply_rotary_pos_emb
        frequencies = model.model.rotary_emb.inv_freq.double()
        seen: dict[str, torch.Tensor] = {}

        def at(query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            angles = positions.double()[:, None] * torch.cat([frequencies, frequencies])
            return rotate(query.double(), query.double(), angles.cos()[None], angles.sin()[None])[0]

        def keep(
            query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            seen["query"] = query
            return rotate(query, key, cos, sin)

        def attention(
            module: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *_: object,
            **__: object,
        ) -> tuple[torch.Tensor, None]:
            positions = torch.arange(query.shape[2])
            within = at(seen["query"], positions.clamp(max=SINKS + WINDOW - 1))
            mixed = attend(
                definition, Row(query[0], within[0], key[0], value[0]), torch.zeros(query.shape[1])
            )
            return mixed.float()[None].transpose(1, 2), None

        AttentionInterface.register("definition", attention)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", keep)
        model.set_attn_implementation("definition")
        return reference(model, tokens)

    return apply


def test_beyond_the_window_it_is_the_definition(
    streaming_llm: Callable[[PreTrainedModel, np.ndarray], np.ndarray],
) -> None:
    model = tiny_model("llama")
    dense = reference(model, TOKENS)
    graph = streaming_graph(model)
    expected = streaming_llm(model, TOKENS)
    assert_close(logits(graph, TOKENS), expected)
    assert np.abs(expected - dense)[WINDOW + SINKS :].max() > 1e-3 * np.abs(dense).max(), (
        "and not dense attention"
    )


def test_online_rotations_of_queries_and_keys_compose(
    streaming_llm: Callable[[PreTrainedModel, np.ndarray], np.ndarray],
) -> None:
    """R3 is copied onto the second query: rotated keys are stored, and logits stay (systems: section 9)."""
    model = tiny_model("llama")
    graph = export(open_checkpoint(model))
    RotateHeads(Rotation("random-hadamard"), "r3").run(graph)
    StreamAttention(STREAMING).run(graph)
    assert ops(graph).count("FastHadamard") == 3 * 2, "query, second query and key of two layers"
    assert_close(logits(graph, TOKENS), streaming_llm(model, TOKENS))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_layers_that_slide_keep_their_meaning_at_any_length(kind: str) -> None:
    """Windows of 16 in the model; the others get one that is longer than the text."""
    model = tiny_model(kind)
    graph = export(open_checkpoint(model))
    decay = 0.5 if kind == "gemma3_text" else 0.0  # where all layers slide, none decays
    report = StreamAttention(AttentionScheme("streaming", 0, 64, decay)).run(graph)
    assert any("0 sinks, window 16" in note for note in report.notes)
    assert_close(logits(graph, TOKENS), reference(model, TOKENS))


def test_masks_are_read_by_what_they_show() -> None:
    graph = export(open_checkpoint(tiny_model("gemma2")))
    masks = {id(node.inputs[3]): node.inputs[3] for node in graph.nodes if node.op == "Attention"}
    assert sorted(mask_window(graph, mask) or 0 for mask in masks.values()) == [0, 16]


def test_decay_lowers_far_logits() -> None:
    model = tiny_model("llama")
    graphs = []
    for decay in (0.0, 0.5):
        graph = export(open_checkpoint(model))
        StreamAttention(AttentionScheme("streaming", SINKS, WINDOW, decay)).run(graph)
        graphs.append(graph)
    plain, decayed = (logits(graph, TOKENS) for graph in graphs)
    assert_close(
        decayed[: SINKS + 1], plain[: SINKS + 1]
    )  # sinks do not decay, nor does the query's own token
    assert np.abs(decayed - plain)[SINKS + 2 :].max() > 1e-3 * np.abs(plain).max()


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.01), ("int4", 0.2)])
def test_quantized_caches_are_near_the_float_one(name: str, tolerance: float) -> None:
    model = tiny_model("llama")
    plain = logits(streaming_graph(model), TOKENS)
    stored = logits(streaming_graph(model, CacheFormat.named(name)), TOKENS)
    assert_close(stored, plain, tolerance)
    assert np.abs(stored - plain).max() > 0


def test_the_interface_is_lengths_and_bounded_caches() -> None:
    graph = streaming_graph(tiny_model("llama"), CacheFormat.named("int4"))
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    assert list(inputs)[:4] == ["input_ids", "logit_index", "past_length", "new_length"]
    names = ["sink_key", "sink_value", "window_key", "window_value", "window_key_scale", "window_value_scale"]
    assert list(inputs)[4:] == [f"cache.{n}.{name}" for n in range(2) for name in names]
    outputs = [tensor.name for tensor in graph.outputs]
    assert outputs == ["logits", *(f"present.{n}.{name}" for n in range(2) for name in names)]
    assert inputs["cache.1.window_key"].shape == ["batch", 2, WINDOW, 4]
    assert inputs["cache.1.window_key"].dtype == np.int8
    node = next(node for node in graph.nodes if node.op == "SinkWindowAttentionInt4")
    assert (node.attrs["plugin_namespace"], node.attrs["plugin_version"]) == ("rotexport", "1")


def test_only_the_chosen_logits_are_computed() -> None:
    model = tiny_model("llama")
    graph = streaming_graph(model)
    every = logits(graph, TOKENS)
    some = logits(graph, TOKENS, logit_index=np.array([[39, 3]]))
    assert_close(some, every[[39, 3]])


def test_rows_have_lengths_of_their_own() -> None:
    graph = streaming_graph(tiny_model("llama"))
    alone = logits(graph, TOKENS[:9])
    call = feeds(graph, TOKENS[:9])
    both = {name: np.concatenate([value, value]) for name, value in call.items()}
    both["new_length"] = np.array([4, 9], np.int32)
    output = run(graph, **both)[0]
    assert_close(output[1], alone)
    assert_close(output[0, :4], alone[:4])


@pytest.mark.parametrize("policy", ["heavy-hitter", "snapkv"])
def test_evicting_caches_are_the_model_while_all_fits_and_the_definition_after(policy: str) -> None:
    model = tiny_model("llama")
    graph = export(open_checkpoint(model))
    eviction = Eviction(policy, recent=4, context=64, observe=4)
    StreamAttention(AttentionScheme("streaming", SINKS, WINDOW, eviction=eviction)).run(graph)
    names = [tensor.name for tensor in graph.inputs if tensor.name.startswith("cache.1.window")]
    memory = {"heavy-hitter": "score", "snapkv": "observed"}[policy]
    assert names == [f"cache.1.window_{name}" for name in ("key", "value", "position", memory)]
    assert_close(logits(graph, TOKENS[:WINDOW]), reference(model, TOKENS[:WINDOW]))
    first = feeds(graph, TOKENS[:30])
    read, *presents = run(graph, **first)
    dense = reference(model, TOKENS[:30])
    assert_close(read[0][: SINKS + WINDOW], dense[: SINKS + WINDOW])
    assert_close(read[0], dense, 1e-3)  # a call sees all of its own tokens; only sinks come nearer
    held = dict(zip([tensor.name for tensor in graph.outputs[1:]], presents, strict=True))
    positions = held["present.0.window_position"][0] - 1
    assert positions.shape == (2, WINDOW)
    assert (positions[:, :4] == [29, 28, 27, 26]).all(), "the newest stay"
    assert positions.min() >= SINKS
    assert not np.array_equal(positions[0], positions[1]), "each key head chooses for itself"


def test_heads_decay_by_slopes_of_their_own() -> None:
    graph = export(open_checkpoint(tiny_model("llama")))
    StreamAttention(AttentionScheme("streaming", SINKS, WINDOW, decay="alibi")).run(graph)
    node = next(node for node in graph.nodes if node.op == "SinkWindowAttention")
    assert node.inputs[7].values.tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]


def test_learned_positions_and_foreign_masks_are_refused() -> None:
    graph = export(open_checkpoint(tiny_model("gpt2")))
    with pytest.raises(UnsupportedModelError, match="learned positions"):
        StreamAttention(STREAMING).run(graph)
    graph = export(open_checkpoint(tiny_model("llama")))
    show = next(node for node in graph.nodes if node.op == "Where")
    show.inputs[1] = gs.Constant("tilt", np.array(0.5, np.float32))
    with pytest.raises(UnsupportedModelError, match="neither causal nor a sliding window"):
        StreamAttention(STREAMING).run(graph)


def test_a_cache_of_another_layer_is_refused() -> None:
    graph = export(open_checkpoint(tiny_model("llama")))
    first, second = (node for node in graph.nodes if node.op == "Attention")
    second.inputs[1] = first.inputs[1]
    with pytest.raises(GraphError, match="attention 1 does not append"):
        StreamAttention(STREAMING).run(graph)
