"""Streams in ONNX Runtime: whatever the calls, the same tokens; a cache that stays as large as it is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.builds import streaming_build, streaming_graph
from support.tiny import tiny_model
from transformers import PreTrainedModel

from rotexport.errors import TargetError, ValidationError
from rotexport.passes.lasting_positions import LAST_POSITION
from rotexport.runtime.sampling import Sampling
from rotexport.runtime.session import Session
from rotexport.streaming.cache import graph_cache_bytes
from rotexport.streaming.eviction import Eviction
from rotexport.streaming.scheme import AttentionScheme

TOKENS = np.random.default_rng(0).integers(0, 96, 40)


@pytest.fixture
def session(streaming_model: Path) -> Session:
    return Session(streaming_model, threads=1)


def test_within_the_window_it_is_the_model(session: Session, tiny: PreTrainedModel) -> None:
    with torch.no_grad():
        expected = tiny(torch.from_numpy(TOKENS[None, :12])).logits[0].numpy()
    found = np.concatenate([logits for _, logits in session.graph.forward(TOKENS[:12])])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_steps_in_place_give_what_calls_with_two_buffers_give(session: Session) -> None:
    stepped = [session.step(token) for token in TOKENS]
    session.reset()
    called = np.concatenate(
        [session.graph.call(TOKENS[:7], range(7)), session.graph.call(TOKENS[7:], range(33))]
    )
    np.testing.assert_allclose(stepped, called, atol=1e-5 * np.abs(called).max())


def test_a_prompt_is_read_in_calls_of_at_most_the_window(session: Session) -> None:
    assert session.graph.call_tokens == 12
    assert [len(tokens) for tokens, _ in session.graph.forward(TOKENS)] == [12, 12, 12, 4]
    session.reset()
    last = session.prefill(TOKENS)
    session.reset()
    np.testing.assert_allclose(last, [session.step(t) for t in TOKENS][-1], atol=1e-5 * np.abs(last).max())


def test_a_prompt_that_chooses_what_stays_is_read_in_one_call(tiny: PreTrainedModel, tmp_path: Path) -> None:
    eviction = Eviction("snapkv", recent=4, context=64, observe=4)
    scheme = AttentionScheme("streaming", 2, 12, eviction=eviction)
    session = Session(streaming_build(tiny, tmp_path / "snap", scheme=scheme), threads=1)
    found = session.prefill(TOKENS[:30])
    whole = session.step(TOKENS[30])
    session.reset()
    np.testing.assert_array_equal(found, session.graph.call(TOKENS[:30], [29])[0])
    session.reset()
    for _ in session.graph.forward(TOKENS[:30]):  # in pieces other tokens stay
        pass
    assert np.abs(session.step(TOKENS[30]) - whole).max() > 1e-4


def test_greedy_generation_continues_the_prompt(session: Session) -> None:
    generated = list(session.generate(TOKENS[:5], 6))
    session.reset()
    logits = session.prefill(TOKENS[:5])
    by_hand = []
    for _ in range(6):
        by_hand.append(int(np.argmax(logits)))
        logits = session.step(by_hand[-1])
    assert generated == by_hand
    session.reset()
    assert list(session.generate(TOKENS[:5], 6, stop=by_hand[2:3])) == by_hand[: by_hand.index(by_hand[2])]


def test_a_saved_cache_continues_where_it_was(
    session: Session, streaming_model: Path, tmp_path: Path
) -> None:
    session.prefill(TOKENS[:30])
    session.save(tmp_path / "stream.npz")
    expected = session.step(TOKENS[30])
    other = Session(streaming_model, threads=1)
    other.restore(tmp_path / "stream.npz")
    assert other.length == 30
    np.testing.assert_array_equal(other.step(TOKENS[30]), expected)


def test_a_cache_of_another_model_is_refused(session: Session, tmp_path: Path) -> None:
    session.prefill(TOKENS[:3])
    session.save(tmp_path / "stream.npz")
    torch_model = tiny_model("llama")
    with torch.no_grad():
        torch_model.get_input_embeddings().weight.add_(1)
    other = Session(streaming_build(torch_model, tmp_path / "other"), threads=1)
    with pytest.raises(ValidationError, match="another model"):
        other.restore(tmp_path / "stream.npz")
    (tmp_path / "text.npz").write_text("no cache")
    with pytest.raises(ValidationError, match=r"text\.npz"):
        session.restore(tmp_path / "text.npz")


def test_the_cache_is_as_large_as_said_and_does_not_grow(session: Session, tiny: PreTrainedModel) -> None:
    before = session.cache_bytes
    heads, size, layers = 2, 8, 2
    assert before == layers * heads * size * (2 + 12) * 2 * 4
    assert before == graph_cache_bytes(streaming_graph(tiny))
    session.prefill(TOKENS)
    assert sum(values.nbytes for values in session.graph.state().values()) == before


def test_positions_end_where_the_tables_end(session: Session) -> None:
    session.graph.length = LAST_POSITION
    session.step(1)
    with pytest.raises(ValidationError, match=str(LAST_POSITION)):
        session.step(1)


def test_no_tokens_and_no_streaming_graph_are_refused(session: Session, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="at least one token"):
        session.prefill([])
    with pytest.raises(TargetError, match="no model"):
        Session(tmp_path)


def test_sampling_keeps_the_likeliest_tokens() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.4]))
    kept, shares = Sampling(temperature=1.0, top_p=0.8).candidates(logits)
    assert kept.tolist() == [1, 2]
    np.testing.assert_allclose(shares, [5 / 9, 4 / 9])
    draw = Sampling(temperature=1.0, seed=3).sampler()
    drawn = np.bincount([draw(logits) for _ in range(2000)], minlength=3) / 2000
    np.testing.assert_allclose(drawn, [0.1, 0.5, 0.4], atol=0.05)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValidationError, match=str(next(iter(bad.values())))):
            Sampling(**bad)
