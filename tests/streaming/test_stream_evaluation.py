"""Perplexity along a stream, against PyTorch's losses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rotexport.checkpoint import open_checkpoint
from rotexport.errors import ValidationError
from rotexport.export import export
from rotexport.graph.io import WeightFile, save_model
from rotexport.passes.stream_attention import StreamAttention
from rotexport.runtime.session import Session
from rotexport.streaming.cache import FLOAT_CACHE, CacheFormat
from rotexport.streaming.evaluate import Rereading, evaluate_dense, evaluate_stream, without_sinks
from rotexport.streaming.eviction import RING, Eviction
from rotexport.streaming.scheme import AttentionScheme

TOKENS = np.random.default_rng(0).integers(0, 96, 45)


def losses(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[None, :-1])).logits[0].double()
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:]), reduction="none").numpy()


def test_within_the_window_losses_are_pytorchs(streaming_model: Path, tiny: PreTrainedModel) -> None:
    found = evaluate_stream(Session(streaming_model, threads=1), TOKENS[:13])
    np.testing.assert_allclose(found.loss, losses(tiny, TOKENS[:13]).mean(), rtol=1e-6)
    assert found.tokens == 12
    assert found.perplexity == pytest.approx(np.exp(found.loss))


def test_buckets_cover_the_stream_without_gaps(streaming_model: Path) -> None:
    session = Session(streaming_model, threads=1)
    found = evaluate_stream(session, TOKENS, bucket=10)
    assert [(b.start, b.stop) for b in found.buckets] == [(1, 11), (11, 21), (21, 31), (31, 41), (41, 45)]
    weighted = sum(b.loss * (b.stop - b.start) for b in found.buckets) / 44
    assert found.loss == pytest.approx(weighted)
    assert found.cache_bytes == session.cache_bytes
    assert found.to_dict()["buckets"][0]["perplexity"] == found.buckets[0].perplexity


def test_the_dense_model_predicts_from_the_last_tokens_only(tiny: PreTrainedModel) -> None:
    found = evaluate_dense(tiny, TOKENS, bucket=8, reading=Rereading(window=16, stride=4))
    expected = []
    for start in range(0, 44, 4):
        stop = start + 4
        expected += list(losses(tiny, TOKENS[max(0, stop - 16) : stop + 1])[-4:])
    np.testing.assert_allclose(found.loss, np.mean(expected), rtol=1e-6)
    np.testing.assert_allclose(found.buckets[1].loss, np.mean(expected[8:16]), rtol=1e-6)


def test_window_only_is_the_same_graph_that_sees_no_sinks(streaming_model: Path) -> None:
    whole = Session(streaming_model, threads=1)
    with without_sinks(streaming_model) as path:
        window_only = Session(path, threads=1)
        assert path.is_file()
    assert not path.exists()
    first = whole.prefill(TOKENS[:12]), window_only.prefill(TOKENS[:12])
    np.testing.assert_allclose(*first, atol=1e-6)
    later = whole.prefill(TOKENS[12:]), window_only.prefill(TOKENS[12:])
    assert np.abs(later[0] - later[1]).max() > 1e-4


def test_window_only_copies_of_any_cache_are_builds_without_sinks(
    tiny: PreTrainedModel, tmp_path: Path
) -> None:
    """Angles of centered keys follow the ring's slots, which start at the first token that is no sink."""
    exported = export(open_checkpoint(tiny))
    means = {layer: np.random.default_rng(layer).standard_normal((2, 8)) for layer in range(2)}
    eviction = Eviction("heavy-hitter", recent=4, context=64)
    for name, stored, policy in (
        ("center", CacheFormat(4, center=True), RING),
        ("evict", FLOAT_CACHE, eviction),
    ):
        logits = []
        for sinks in (2, 0):
            graph = exported.copy()
            StreamAttention(AttentionScheme("streaming", sinks, 12, eviction=policy), stored, means).run(
                graph
            )
            path = tmp_path / f"{name}.{sinks}.onnx"
            save_model(graph, path, WeightFile(path.with_suffix(".data")))
        with without_sinks(tmp_path / f"{name}.2.onnx") as copy:
            for one in (copy, path):
                session = Session(one, threads=1)
                session.prefill(TOKENS[:20])
                logits.append(session.prefill(TOKENS[20:]))
        np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)


def test_a_stream_that_predicts_nothing_is_refused(streaming_model: Path) -> None:
    with pytest.raises(ValidationError, match="1 tokens"):
        evaluate_stream(Session(streaming_model, threads=1), TOKENS[:1])
    with pytest.raises(ValidationError, match="stride of 20"):
        Rereading(window=16, stride=20)
