"""What attention that chooses what stays makes of odd inputs, on the emulator: no number leaks, none is trusted."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attention_checks import assert_close
from emulated import EmulatorError
from emulated_eviction import EmulatedEviction
from eviction_cases import (
    HEAVY,
    POLICIES,
    SNAP,
    EvictingCase,
    assert_holds,
    assert_slots_hold_their_tokens,
    held_scores,
    session_of,
    with_policy,
)

from rotexport.streaming.eviction import Eviction


@pytest.fixture(scope="module")
def kernels(emulated: Path) -> EmulatedEviction:
    return EmulatedEviction(emulated / "librotexport_emulated_kernels.so")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tokens", [3, 30])
def test_rows_of_the_batch_do_not_leak(kernels: EmulatedEviction, policy: Eviction, tokens: int) -> None:
    """Between a NaN row and an infinite one, a row is what it is alone; slots that hold nothing are not read.

    The next call meets what the first one stored.
    """
    case = EvictingCase(repeat=2, window=20, policy=policy)
    session = session_of(kernels, case, [tokens + 2] * 3)
    for row, poison in ((0, np.nan), (2, np.inf)):
        for name in ("query", "query_sink", "key", "value"):
            getattr(session.streams[row], name)[:] = poison
    for name in ("sink_key", "sink_value", "window_key", "window_value", "window_score"):
        session.cache[name][:] = np.nan
    outputs = np.concatenate([session.call([new] * 3) for new in (tokens, 2)], 2)
    calls = [tokens, 2]
    assert_close(case, session.streams[1], outputs[1], case.evicted(session.streams[1], calls).output.numpy())
    assert_holds(session, 1, calls)
    newest = range(tokens + 1, tokens + 1 - min(4, tokens + 2 - case.sinks), -1)
    for row in (0, 2):
        assert list(held_scores(session, row, 0))[: len(newest)] == list(newest), "recent tokens stay"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tokens", [1, 30])
def test_a_row_without_tokens_keeps_what_it_holds(
    kernels: EmulatedEviction, policy: Eviction, tokens: int
) -> None:
    session = session_of(kernels, EvictingCase(policy=policy), [60, 60])
    session.call([30, 11])
    before = held_scores(session, 1, 0)
    output = session.call([tokens, 0])
    assert not output[1].any()
    assert held_scores(session, 1, 0) == before
    assert_slots_hold_their_tokens(session)


@pytest.mark.parametrize("tokens", [4, 30])
def test_garbage_is_survived(kernels: EmulatedEviction, tokens: int) -> None:
    """A builder times kernels on whatever its buffers hold: the emulator would report a wild access."""
    case = EvictingCase(window=70)
    call = session_of(kernels, case, [tokens]).next_call([tokens], tokens, 0.0)
    whole, _ = kernels.run(case.problem(1, tokens), call)
    lengths = {"past_length": np.int32([-7]), "new_length": np.int32([2**31 - 1])}
    np.testing.assert_array_equal(kernels.run(case.problem(1, tokens), replace(call, **lengths))[0], whole)
    rng = np.random.default_rng(0)
    wild = rng.integers(-(2**31), 2**31, (1, 1, 70)).astype(np.int32)
    wild[..., ::2] %= 100
    scores = rng.standard_normal((1, 1, 70)).astype(np.float32)
    cache = call.cache | {"window_position": wild, "window_score": scores}
    for past in (0, 55, 2**31 - 1):
        one = replace(call, cache=cache, past_length=np.int32([past]))
        kernels.run(case.problem(1, tokens), one)


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        (EvictingCase(head_size=72), "head_size is 72, the kernel needs a multiple of 16 up to 256"),
        (EvictingCase(window=0), "window is 0, a query sees at least itself"),
        (EvictingCase(softcap=-1.0), "softcap is -1.000000, must not be negative"),
        (
            with_policy(EvictingCase(), recent=21),
            "recent is 21, must lie between 0 and the window of 20",
        ),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(
    kernels: EmulatedEviction, case: EvictingCase, complaint: str
) -> None:
    call = session_of(kernels, EvictingCase(), [1]).next_call([1], 1, 0.0)
    with pytest.raises(EmulatorError) as caught:
        kernels.run(case.problem(1, 1), call)
    assert str(caught.value) == f"HeavyHitterAttention: {complaint}"


@pytest.mark.parametrize(
    ("policy", "changed", "complaint"),
    [
        (HEAVY, {"context": 0}, "HeavyHitterAttention: context is 0, a query sees at least itself"),
        (HEAVY, {"forget": 1.5}, "HeavyHitterAttention: forget is 1.500000, must lie between 0 and 1"),
        (SNAP, {"observe": 0}, "SnapAttention: observe is 0, must be positive"),
    ],
)
def test_numbers_no_recipe_has_are_refused(
    kernels: EmulatedEviction, policy: Eviction, changed: dict[str, float], complaint: str
) -> None:
    case = EvictingCase(policy=policy)
    call = session_of(kernels, case, [1]).next_call([1], 1, 0.0)
    problem = case.problem(1, 1)
    for name, value in changed.items():
        setattr(problem, name, value)
    with pytest.raises(EmulatorError) as caught:
        kernels.run(problem, call)
    assert str(caught.value) == complaint


def test_one_workspace_serves_all_smaller_calls(emulated: Path) -> None:
    """Few rows are split into parts, whose sums may take more than a larger call does without."""
    measure = ctypes.CDLL(str(emulated / "librotexport_emulated_kernels.so")).emulated_eviction_workspace
    measure.restype = ctypes.c_size_t
    case = EvictingCase(128, 128, kv_heads=8, repeat=4, window=1000)

    def workspace(batch: int, tokens: int) -> tuple[int, int]:
        own = ctypes.c_size_t()
        problem = case.problem(batch, tokens)
        return measure(ctypes.byref(problem), ctypes.byref(own)), own.value

    largest, own = workspace(8, 300)
    smaller = [workspace(batch, tokens)[1] for batch in (1, 3, 8) for tokens in (1, 16, 64, 200, 300)]
    assert max(smaller) > own, "the largest call is not the one that needs most"
    assert max(smaller) <= largest
