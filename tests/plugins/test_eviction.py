"""Attention that chooses what stays, on the emulator: against the definition in float64, and the bodies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from attention_cases import Session
from attention_checks import assert_caches_equal, assert_close
from emulated_eviction import EmulatedEviction
from eviction_cases import (
    HEAVY,
    POLICIES,
    SNAP,
    EvictingCase,
    assert_holds,
    assert_scores_close,
    assert_slots_hold_their_tokens,
    held_scores,
    session_of,
)

from rotexport.streaming.eviction import Eviction

TYPES = (np.float16, ml_dtypes.bfloat16)
SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (112, 48), (16, 256)]


@pytest.fixture(scope="module")
def kernels(emulated: Path) -> EmulatedEviction:
    return EmulatedEviction(emulated / "librotexport_emulated_kernels.so")


def check_stream(
    kernels: EmulatedEviction, case: EvictingCase, calls: list[list[int]], seed: int = 0
) -> None:
    """Run calls (new tokens of each row); compare outputs, what stays and its scores with the definition."""
    rng = np.random.default_rng(seed)
    lengths = [max(length, 1) for length in np.sum(calls, axis=0)]
    session = session_of(kernels, case, lengths, seed)
    outputs: list[list[np.ndarray]] = [[] for _ in lengths]
    for new in calls:
        output = session.call(new, max(new) + int(rng.integers(3)), schedule=int(rng.integers(3)))
        for row, count in enumerate(new):
            assert not output[row, :, count:].astype(np.float64).any(), "padded tokens have no output"
            outputs[row].append(output[row, :, :count])
    assert_slots_hold_their_tokens(session)
    for row, stream in enumerate(session.streams):
        own = [new[row] for new in calls if new[row]]
        if not own:
            continue
        expected = case.evicted(stream, own).output.numpy()
        assert_close(case, stream, np.concatenate(outputs[row], 1), expected)
        assert_holds(session, row, own)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size_and_type(kernels: EmulatedEviction, sizes: tuple[int, int], dtype: type) -> None:
    """A prompt, a few tokens, one more, then a longer call over what is held."""
    policy = HEAVY if dtype is np.float16 else SNAP
    check_stream(kernels, EvictingCase(*sizes, repeat=2, dtype=dtype, policy=policy), [[38], [3], [1], [20]])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_ragged_calls_compute_the_definition(kernels: EmulatedEviction, policy: Eviction, seed: int) -> None:
    rng = np.random.default_rng(seed)
    window = int(rng.integers(5, 40))
    case = EvictingCase(
        *(64, 64, int(rng.integers(1, 3)), int(rng.choice([1, 2, 3])), int(rng.integers(0, 6)), window),
        softcap=float(rng.choice([0, 2.5])),
        decay=float(rng.choice([0, 0.5])),
        dtype=TYPES[seed % 2],
        policy=replace(
            policy,
            recent=int(rng.integers(1, window)),
            context=int(rng.integers(window, 70)),
            forget=float(rng.choice([1.0, 0.9, 0.0])),
            observe=int(rng.integers(1, 12)),
        ),
    )
    calls = [[int(n) for n in rng.choice([0, 1, 2, 17, 33], size=2)] for _ in range(4)]
    check_stream(kernels, case, calls, seed)


def check_against_body(session: Session, new: list[int]) -> None:
    """The next call leaves the cache that the body leaves, slot by slot, and gives its output."""
    case = session.case
    assert isinstance(case, EvictingCase)
    tokens = max(*new, 1)
    expected, present = case.body(session.next_call(new, tokens, 0.0))
    output = session.call(new, tokens)
    for row, stream in enumerate(session.streams):
        assert_close(case, stream, output[row], expected[row])
        assert not output[row, :, new[row] :].any(), "padded tokens have no output"
    score = present.pop("window_score")
    assert_scores_close(session.cache["window_score"], score)
    for name, content in present.items():
        np.testing.assert_array_equal(session.cache[name].astype(content.dtype), content, err_msg=name)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_kernel_computes_its_operators_body(kernels: EmulatedEviction, policy: Eviction) -> None:
    """Over many tiles of slots and tokens, with slots that were never filled, and rows that bring nothing."""
    case = EvictingCase(
        *(64, 64, 1, 2, 3, 600), softcap=4.0, decay=0.01, policy=replace(policy, recent=100, context=650)
    )
    session = session_of(kernels, case, [900, 300])
    for new in ([520, 90], [180, 0], [1, 3], [0, 0], [190, 197]):
        check_against_body(session, new)


def test_calls_whose_keys_are_not_split(kernels: EmulatedEviction) -> None:
    """Many rows of the batch occupy a GPU without parts; one of them brings nothing."""
    case = EvictingCase(*(16, 16, 16, 1, 1, 6), policy=replace(HEAVY, recent=2))
    check_against_body(session_of(kernels, case, [9] * 64), [9] * 62 + [1, 0])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tokens", [2, 40])
def test_schedules_and_buffers_do_not_matter(
    kernels: EmulatedEviction, policy: Eviction, tokens: int
) -> None:
    case = EvictingCase(kv_heads=2, repeat=2, window=18, decay=0.1, policy=policy)
    outcomes = []
    for schedule, in_place in [(0, True), (1, True), (2, False)]:
        session = session_of(kernels, case, [60, 60])
        session.call([20, 7])
        output = session.call([tokens, 1], schedule=schedule, in_place=in_place)
        outcomes.append({"output": output, **session.cache})
    assert_caches_equal(outcomes[1], outcomes[0])
    assert_caches_equal(outcomes[2], outcomes[0])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("past", [0, 30])
def test_few_queries_choose_as_many_do(kernels: EmulatedEviction, policy: Eviction, past: int) -> None:
    """Few keep their logits, many multiply again: padding makes many of few."""
    case = EvictingCase(
        kv_heads=2, repeat=2, window=6, softcap=3.0, decay=0.1, policy=replace(policy, recent=2)
    )
    outcomes = []
    for padded in (8, 9):
        session = session_of(kernels, case, [40])
        if past:
            session.call([past])
        output = session.call([8], padded)[:, :, :8]
        outcomes.append({"output": output, **session.cache})
    scores = [outcome.pop("window_score") for outcome in outcomes]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5, atol=1e-7)
    assert_caches_equal(outcomes[1], outcomes[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_of_equals_the_newer_stay(kernels: EmulatedEviction, policy: Eviction) -> None:
    """Equal keys draw equally from the last query, which alone counts; what is zero is equal, too."""
    case = EvictingCase(sinks=1, window=10, policy=replace(policy, forget=0.0, observe=1))
    session = session_of(kernels, case, [30])
    for kind in ("key", "value"):
        tokens = getattr(session.streams[0], kind)
        tokens[:] = tokens[:, :1]
    for new, newest in ([20], 19), ([3], 22), ([1], 23):
        session.call(new)
        assert list(held_scores(session, 0, 0)) == list(range(newest, newest - 10, -1))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tokens", [4, 30])
def test_of_tokens_that_draw_alike_those_with_the_largest_values_stay(
    kernels: EmulatedEviction, policy: Eviction, tokens: int
) -> None:
    """Queries of zeros weigh all that they see alike: attention alone would keep others."""
    case = EvictingCase(sinks=0, window=6, policy=replace(policy, recent=2, forget=0.0, observe=1))
    session = session_of(kernels, case, [34])
    stream = session.streams[0]
    stream.query[:] = 0
    large = [0, 1, 2, 3] if tokens == 4 else [3, 8, 13, 21]
    stream.value[:] = 0.1
    stream.value[:, large] = -3
    session.call([tokens])
    session.call([4])
    assert list(held_scores(session, 0, 0)) == [tokens + 3, tokens + 2, *reversed(large)]


def test_a_token_that_draws_outlives_newer_ones_but_not_the_context(kernels: EmulatedEviction) -> None:
    case = EvictingCase(sinks=1, window=6, policy=replace(HEAVY, recent=3, context=24))
    session = session_of(kernels, case, [40])
    stream = session.streams[0]
    stream.query[:] = 0
    stream.query[..., 0] = 80
    stream.key[..., 0] = 0
    stream.key[:, 4, 0] = 1
    session.call([12])
    for end in range(13, 34):
        session.call([1])
        assert (4 in held_scores(session, 0, 0)) == (end - 4 < 24)
        assert_slots_hold_their_tokens(session)


@pytest.mark.parametrize("tokens", [1, 30])
def test_long_streams_are_as_exact_as_short_ones(kernels: EmulatedEviction, tokens: int) -> None:
    """Only distances count: where all positions are larger by the same, everything else is equal, bit for bit."""
    case = EvictingCase(decay=0.3)
    session = session_of(kernels, case, [40 + tokens])
    session.call([40])
    call = session.next_call([tokens], tokens, 0.0)
    far = np.int32(10**9)
    counts = call.cache["window_position"]
    later = replace(
        call,
        past_length=call.past_length + far,
        cache=call.cache | {"window_position": np.where(counts > 0, counts + far, 0).astype(np.int32)},
    )
    problem = case.problem(1, tokens)
    (output, cache), (output_later, cache_later) = (kernels.run(problem, one) for one in (call, later))
    np.testing.assert_array_equal(output_later, output)
    counts = cache["window_position"]
    cache["window_position"] = np.where(counts > 0, counts + far, 0).astype(np.int32)
    assert_caches_equal(cache_later, cache)
