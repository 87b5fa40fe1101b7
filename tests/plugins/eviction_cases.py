"""Calls of the operators that choose what stays: their sizes, their body in ONNX Runtime, what a cache holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from attention_cases import Case, Session, Stream
from emulated_attention import Call
from emulated_eviction import EmulatedEviction
from structures import POLICIES as POLICY_NUMBERS
from structures import EvictionProblem
from support import evictions
from support.streams import Shape

from rotexport.streaming.eviction import Eviction
from rotexport.streaming.eviction_oracle import Evicted, evict
from rotexport.streaming.oracle import Definition, Row

KINDS = ("key", "value")
HEAVY = Eviction("heavy-hitter", recent=4, context=1000, forget=0.97)
SNAP = Eviction("snapkv", recent=4, context=1000, observe=9)
POLICIES = [pytest.param(HEAVY, id="heavy-hitter"), pytest.param(SNAP, id="snapkv")]
SCORE_TOLERANCE = 2.0**-17 * 33  # kernels/eviction.h, for logits of at most 32


@dataclass(frozen=True)
class EvictingCase(Case):
    """A Case without codes, and its policy."""

    policy: Eviction = field(default_factory=lambda: Eviction("heavy-hitter", recent=4, context=1000))

    def problem(self, batch: int, tokens: int) -> EvictionProblem:
        p = self.policy
        return EvictionProblem(
            *self.numbers(batch, tokens),
            *(POLICY_NUMBERS[p.policy], p.recent, p.context, p.observe, p.forget),
        )

    def empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        slots = (batch, self.kv_heads, self.window)
        empty = {"window_position": np.zeros(slots, np.int32), "window_score": np.zeros(slots, np.float32)}
        return super().empty_cache(batch) | empty

    @property
    def definition(self) -> Definition:
        return Definition(self.sinks, self.window, self.scale, self.softcap)

    def evicted(self, stream: Stream, calls: list[int]) -> Evicted:
        """Return what the definition makes of one row's calls, in float64."""
        tensors = (stream.query, stream.query_sink, stream.key, stream.value)
        row = Row(*(torch.from_numpy(t.astype(np.float64)) for t in tensors))
        return evict(self.definition, self.policy, row, calls, torch.from_numpy(self.slopes))

    def body(self, call: Call) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return output and cache of the operator's body on a call, in float32."""
        shape = Shape(self.definition, self.kv_heads, self.repeat, self.head_size, self.value_size)
        session = evictions.session(evictions.Case(shape, self.policy))
        given = {name: getattr(call, name) for name in ("query", "query_sink", "key", "value", "decay")}
        cache = dict(zip((i.name for i in session.get_inputs()[8:]), call.cache.values(), strict=True))
        feeds = {name: t.astype(np.float32) for name, t in given.items()}
        feeds |= {n: t if t.dtype == np.int32 else t.astype(np.float32) for n, t in cache.items()}
        tokens = call.key.shape[2]
        feeds |= {"past_length": call.past_length, "new_length": call.new_length}
        feeds["positions"] = call.past_length[:, None] + np.arange(tokens, dtype=np.int64)
        output, *present = session.run(None, feeds)
        return output, dict(zip(call.cache, present, strict=True))


def session_of(kernels: EmulatedEviction, case: EvictingCase, lengths: list[int], seed: int = 0) -> Session:
    """Return a session over streams of the given lengths."""
    rng = np.random.default_rng(seed)
    return Session(kernels, case, [Stream(case, length, rng) for length in lengths])


def held_scores(session: Session, row: int, head: int) -> dict[int, float]:
    """Return the scores of a row's slots by position, in the order of slots."""
    counts = session.cache["window_position"][row, head]
    scores = session.cache["window_score"][row, head]
    return {int(count) - 1: float(score) for count, score in zip(counts, scores, strict=True) if count}


def assert_slots_hold_their_tokens(session: Session) -> None:
    """Slots hold the keys and values of their positions, bit for bit, in falling order; empty ones zeros."""
    for row, stream in enumerate(session.streams):
        for head in range(session.case.kv_heads):
            counts = session.cache["window_position"][row, head]
            positions = counts[counts > 0] - 1
            assert (np.diff(positions) < 0).all(), "falling order"
            for kind in KINDS:
                slots = session.cache[f"window_{kind}"][row, head]
                expected = getattr(stream, kind)[head, positions]
                np.testing.assert_array_equal(slots[counts > 0].view(np.int16), expected.view(np.int16))
                assert not slots[counts == 0].view(np.int16).any()
            assert not session.cache["window_score"][row, head][counts == 0].any()


def with_policy(case: EvictingCase, **changed: object) -> EvictingCase:
    return replace(case, policy=replace(case.policy, **changed))


def assert_scores_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=SCORE_TOLERANCE, atol=1e-6)


def assert_holds(session: Session, row: int, calls: list[int]) -> None:
    """A row's slots hold what the definition keeps of its calls, with its scores, newest first."""
    case = session.case
    assert isinstance(case, EvictingCase)
    for head, scores in enumerate(case.evicted(session.streams[row], calls).held):
        found = held_scores(session, row, head)
        assert list(found) == list(scores), "the same tokens, newest first"
        assert_scores_close(np.array(list(found.values())), np.array(list(scores.values())))
