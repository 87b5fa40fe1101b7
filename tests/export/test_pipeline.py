"""Exported graphs against PyTorch: the same logits, and the form that the passes rely on."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from support.graphs import run
from support.tiny import tiny_model
from transformers import DynamicCache, PreTrainedModel

from rotexport.checkpoint import open_checkpoint
from rotexport.export import export, pipeline
from rotexport.export.replicate import InseparableBlocksError, replicate
from rotexport.graph.weights import InMemory

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

# What varies: ties, biases, grouped queries, head sizes, windows, norms, positions.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "num_hidden_layers": 3},
    "llama, scaled": {
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 12,
        "rope_parameters": LLAMA3_ROPE,
    },
    "llama, yarn": {"rope_parameters": YARN_ROPE},
    "mistral": {"sliding_window": 3},
    "qwen2": {"dtype": torch.bfloat16},
    "qwen3": {"head_dim": 12},
    "gemma3_text": {
        "head_dim": 12,
        "query_pre_attn_scalar": 17,
        "sliding_window": 3,
        "num_hidden_layers": 3,
        "layer_types": GEMMA_LAYERS,
        "final_logit_softcapping": 5.0,
    },
    "gemma2": {"sliding_window": 3, "attn_logit_softcapping": 1.0},
    "opt": {"num_hidden_layers": 3},
    "opt, post-norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "phi": {"partial_rotary_factor": 0.5},
}


@dataclass
class Exported:
    """A model, its graph, and how many elements of each tensor the exporter read on the way."""

    model: PreTrainedModel
    graph: gs.Graph
    read: list[int]

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers


@functools.cache
def export_of(name: str) -> Exported:
    """Export an architecture once for all tests."""
    model = tiny_model(name.split(",", maxsplit=1)[0], **ARCHITECTURES[name])
    model.set_attn_implementation("eager")
    checkpoint = open_checkpoint(model)
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InMemory, "read", lambda self: read.append(self.array.size) or self.array)
        graph = export(checkpoint)
    return Exported(model.float(), graph, read)


@pytest.fixture(params=ARCHITECTURES)
def exported(request: pytest.FixtureRequest) -> Exported:
    return export_of(request.param)


def calls(lengths: list[int], vocabulary: int = 96) -> Iterator[dict[str, np.ndarray]]:
    """Yield the inputs of successive calls on two texts; the second is shorter, padded on the left."""
    total = sum(lengths)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, vocabulary, (2, total))
    seen = np.ones((2, total), np.int64)
    seen[1, :3] = 0
    positions = np.maximum(np.cumsum(seen, axis=1) - 1, 0)
    start = 0
    for length in lengths:
        stop = start + length
        yield {
            "input_ids": ids[:, start:stop],
            "attention_mask": seen[:, :stop],
            "position_ids": positions[:, start:stop],
        }
        start = stop


def onnx_logits(graph: gs.Graph, lengths: list[int]) -> list[np.ndarray]:
    """Run the calls, each on the cache that the last one returned."""
    cache = [tensor for tensor in graph.inputs if tensor.name.startswith("past_key_values.")]
    past = {t.name: np.zeros((2, t.shape[1], 0, t.shape[3]), np.float32) for t in cache}
    results = []
    for feeds in calls(lengths):
        logits, *present = run(graph, **feeds, **past)
        past = {tensor.name: values for tensor, values in zip(cache, present, strict=True)}
        results.append(logits[feeds["attention_mask"][:, -logits.shape[1] :] == 1])
    return results


@torch.no_grad()
def torch_logits(model: PreTrainedModel, lengths: list[int]) -> list[np.ndarray]:
    """Do the same in PyTorch; padded positions are left out, their logits mean nothing."""
    cache = DynamicCache()
    results = []
    for feeds in calls(lengths):
        inputs = {name: torch.tensor(values) for name, values in feeds.items()}
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits.numpy()
        results.append(logits[feeds["attention_mask"][:, -logits.shape[1] :] == 1])
    return results


def test_prefill_and_decoding_give_the_logits_of_eager_pytorch(exported: Exported) -> None:
    lengths = [7, 1, 4]  # a prompt on an empty cache, one token, a chunk
    expected = torch_logits(exported.model, lengths)
    for ours, theirs in zip(onnx_logits(exported.graph, lengths), expected, strict=True):
        # Both are float32 with sums in different orders: a few ulps of the largest logit.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_the_interface_is_the_one_the_runtime_feeds(exported: Exported) -> None:
    cache = [f"{n}.{kind}" for n in range(exported.layers) for kind in ("key", "value")]
    inputs = {tensor.name: list(tensor.shape) for tensor in exported.graph.inputs}
    assert list(inputs) == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{name}" for name in cache),
    ]
    assert inputs["attention_mask"] == ["batch", "total"]
    assert inputs["past_key_values.0.key"][::2] == ["batch", "past"]
    outputs = {tensor.name: list(tensor.shape) for tensor in exported.graph.outputs}
    assert list(outputs) == ["logits", *(f"present.{name}" for name in cache)]
    assert outputs["logits"] == ["batch", "sequence", 96]
    assert outputs["present.0.value"][::2] == ["batch", "total"]


CANONICAL = {
    # position, mask and cache
    *("Gather", "Shape", "Squeeze", "Range", "Reshape", "Unsqueeze", "Cast", "Cos", "Sin"),
    *("LessOrEqual", "Greater", "And", "Where", "Concat"),
    # blocks
    *("MatMul", "Add", "Sub", "Mul", "Div", "Transpose", "Attention", "RotaryEmbedding"),
    *("RMSNormalization", "LayerNormalization", "Sigmoid", "Gelu", "Relu", "Tanh", "Pow"),
}


def test_only_canonical_operators_remain(exported: Exported) -> None:
    operators = {node.op for node in exported.graph.nodes}
    assert operators <= CANONICAL
    assert {"MatMul", "Attention", "Concat"} <= operators
    assert ("RotaryEmbedding" in operators) == (exported.model.config.model_type != "opt")


def test_every_matrix_is_a_lazy_constant_in_row_vector_form(exported: Exported) -> None:
    state = exported.model.state_dict()
    matmuls = [node for node in exported.graph.nodes if node.op == "MatMul"]
    assert len(matmuls) > 4 * exported.layers
    for node in matmuls:
        weight = node.inputs[1]
        assert weight.dtype == np.float32
        stored = state[weight.name.removesuffix(".transposed")]
        np.testing.assert_array_equal(weight.values, stored.T.numpy())


def test_attention_reads_the_cache_outputs_and_one_mask_per_kind(exported: Exported) -> None:
    attentions = [node for node in exported.graph.nodes if node.op == "Attention"]
    assert len(attentions) == exported.layers
    for layer, node in enumerate(attentions):
        assert [tensor.name for tensor in node.inputs[1:3]] == [
            f"present.{layer}.key",
            f"present.{layer}.value",
        ]
        assert len(node.inputs) == 4
        assert len(node.outputs) == 1
        assert set(node.attrs) <= {"scale", "softcap"}
        assert all(len(tensor.shape) == 4 for tensor in node.inputs)
    masks = {node.inputs[3].name for node in attentions}
    assert len(masks) == len(set(getattr(exported.model.config, "layer_types", None) or ["one"]))


def test_cosines_are_computed_once_per_rope_and_shared(exported: Exported) -> None:
    counts = [sum(node.op == op for node in exported.graph.nodes) for op in ("Cos", "Sin")]
    ropes = {"opt": 0, "gemma3_text": 2}.get(exported.model.config.model_type, 1)
    assert counts == [ropes, ropes]


def test_names_and_order_serve_a_reader(exported: Exported) -> None:
    names = [node.name for node in exported.graph.nodes]
    assert len(set(names)) == len(names)
    tensors = exported.graph.tensors()
    streams = ["block.0.input", *(f"block.{n}.output" for n in range(exported.layers))]
    hidden = exported.model.config.hidden_size
    assert all(list(tensors[name].shape) == ["batch", "sequence", hidden] for name in streams)
    assert all(tensor.dtype is not None and tensor.shape is not None for tensor in tensors.values())
    known = {id(tensor) for tensor in exported.graph.inputs}
    for node in exported.graph.nodes:  # sorted: nothing is read before it is written
        assert all(isinstance(t, gs.Constant) or id(t) in known for t in node.inputs)
        known.update(id(tensor) for tensor in node.outputs)


def listing(graph: gs.Graph) -> list[tuple[Any, ...]]:
    """Return what a graph says, without the numbers of its small constants."""
    return [
        (
            node.name,
            node.op,
            sorted(node.attrs.items()),
            [
                np.asarray(tensor.values).tolist() if tensor.name.startswith("constant.") else tensor.name
                for tensor in node.inputs
            ],
            [tensor.name for tensor in node.outputs],
        )
        for node in graph.nodes
    ]


def test_no_weight_is_read(exported: Exported) -> None:
    assert set(exported.read) <= {1}  # scalars of the graph, such as the 1 in Gemma's 1 + gamma


def test_blocks_that_cannot_be_copied_are_traced_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what comes out is what copying gives: two independent ways to the same graph."""
    copied = export_of("gemma3_text")

    def reluctant(traced: gs.Graph, source: tuple[int, ...], layers: str) -> gs.Graph:
        if source != (0, 1, 2):
            raise InseparableBlocksError("as if a block read another")
        return replicate(traced, source, layers)

    monkeypatch.setattr(pipeline, "replicate", reluctant)
    whole = export(open_checkpoint(copied.model))
    assert listing(copied.graph) == listing(whole)


def test_angles_stay_accurate_at_long_positions() -> None:
    graph = export_of("llama").graph.copy()
    graph.outputs = [next(node for node in graph.nodes if node.op == "Cos").outputs[0]]
    positions = np.array([[0, 1, 65535, 99_999, 100_000], [7, 8, 9, 10, 131_071]])
    graph.inputs = [tensor for tensor in graph.inputs if tensor.name == "position_ids"]
    (ours,) = run(graph.cleanup(), position_ids=positions)
    frequencies = (1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)).numpy()
    # The angle is PyTorch's float32 product; its cosine must be right to float32 precision.
    angles = positions[..., None].astype(np.float32) * frequencies
    np.testing.assert_allclose(ours, np.cos(angles.astype(np.float64)), atol=3e-7)
