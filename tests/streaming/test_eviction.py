"""Caches that keep what drew attention: the operators in ONNX Runtime against the definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.evictions import Case, Evictor
from support.streams import Shape, random_stream, run_stream

from rotexport.errors import RecipeError
from rotexport.passes.stream_attention import StreamAttention
from rotexport.streaming.cache import CacheFormat
from rotexport.streaming.eviction import Eviction
from rotexport.streaming.oracle import Definition
from rotexport.streaming.scheme import AttentionScheme

TOLERANCE = 1e-5  # of the largest output: float32 against float64
POLICIES = ["heavy-hitter", "snapkv"]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@st.composite
def cases(draw: st.DrawFn, policy: str) -> Case:
    window = draw(st.integers(3, 9))
    definition = Definition(
        draw(st.integers(0, 3)), window, scale=0.35, softcap=draw(st.sampled_from([0.0, 0.0, 2.0]))
    )
    eviction = Eviction(
        policy,
        recent=draw(st.integers(1, window - 1)),
        context=draw(st.integers(window, 40)),
        forget=draw(st.sampled_from([1.0, 0.9, 0.5])),
        observe=draw(st.integers(1, 6)),
    )
    sizes = draw(st.sampled_from([(8, 8), (8, 24)]))
    return Case(Shape(definition, draw(st.integers(1, 2)), draw(st.integers(1, 3)), *sizes), eviction)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_ragged_calls_compute_the_definition(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy))
    batch = data.draw(st.integers(1, 2))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    decay = rng.choice([0.0, 0.05], case.shape.query_heads).astype(np.float32)
    streams = [random_stream(case.shape, 30, rng) for _ in range(batch)]
    evictor = Evictor(case, batch, decay)
    calls: list[list[int]] = [[] for _ in streams]
    outputs: list[list[np.ndarray]] = [[] for _ in streams]
    for _ in range(data.draw(st.integers(1, 4))):
        new = [data.draw(st.integers(0, min(12, 30 - p))) for p in evictor.past]
        output = evictor.call(streams, new, max(*new, 1) + data.draw(st.integers(0, 2)))
        for row, count in enumerate(new):
            assert not output[row, :, count:].any(), "padded queries have no output"
            calls[row] += [count] if count else []
            outputs[row].append(output[row, :, :count])
    for row, stream in enumerate(streams):
        if calls[row]:
            expected = case.expected(stream, calls[row], decay)
            done = sum(calls[row])
            assert_close(np.concatenate(outputs[row], axis=1), expected.output[:, :done].numpy())
            for found, scores in zip(evictor.held(row), expected.held, strict=True):
                assert list(found) == list(scores), "the same tokens, newest first"
                np.testing.assert_allclose(list(found.values()), list(scores.values()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("calls", [[24], [9, 1, 1, 13]])
def test_while_all_fits_it_is_sink_window_attention(policy: str, calls: list[int]) -> None:
    shape = Shape(Definition(2, 30, scale=0.35), kv_heads=2, repeat=2)
    stream = random_stream(shape, 24, np.random.default_rng(0))
    evictor = Evictor(Case(shape, Eviction(policy, 4, 100)), 1, np.zeros(4, np.float32))
    output = np.concatenate([evictor.call([stream], [size], size)[0] for size in calls], axis=1)
    assert_close(output, run_stream(shape, stream, calls)[0])


def keys_that_draw(shape: Shape, length: int, wanted: int) -> object:
    """Return a stream in which every query attends to one token."""
    stream = random_stream(shape, length, np.random.default_rng(0))
    stream.query[:] = 0
    stream.query[..., 0] = 30
    stream.key[..., 0] = 0
    stream.key[:, wanted, 0] = 1
    return stream


@pytest.mark.parametrize(("policy", "stays"), [("heavy-hitter", True), ("snapkv", True), ("none", False)])
def test_what_draws_attention_outlives_the_window(policy: str, stays: bool) -> None:
    shape = Shape(Definition(1, 6, scale=1.0))
    stream = keys_that_draw(shape, 30, wanted=4)
    if policy == "none":
        before = run_stream(shape, stream, [8] + [1] * 22)[0]
        forgotten = stream.value.copy()
        stream.value = np.where(np.arange(30)[:, None] == 4, 0, forgotten)
        after = run_stream(shape, stream, [8] + [1] * 22)[0]
        assert np.array_equal(before[:, 20:], after[:, 20:])
        return
    evictor = Evictor(Case(shape, Eviction(policy, 3, 100, observe=2)), 1, np.zeros(1, np.float32))
    for size in [8] + [1] * 22:
        output = evictor.call([stream], [size], size)
    assert (4 in evictor.held(0)[0]) == stays
    np.testing.assert_allclose(output[0, 0, 0], stream.value[0, 4], atol=1e-3)


def test_past_the_trained_context_even_heavy_hitters_go() -> None:
    shape = Shape(Definition(1, 6, scale=1.0))
    stream = keys_that_draw(shape, 30, wanted=4)
    evictor = Evictor(Case(shape, Eviction("heavy-hitter", 3, 12)), 1, np.zeros(1, np.float32))
    seen = []
    for _ in range(30):
        evictor.call([stream], [1], 1)
        seen.append(4 in evictor.held(0)[0])
    assert seen == [last >= 4 and last + 1 - 4 < 12 for last in range(30)]


def test_rotating_values_changes_no_choice() -> None:
    """The L2 norm of values is what R2 leaves alone."""
    shape = Shape(Definition(2, 6, scale=0.5))
    stream = random_stream(shape, 30, np.random.default_rng(3))
    turned = random_stream(shape, 30, np.random.default_rng(3))
    turned.value = turned.value @ np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0].astype(
        "f"
    )
    held = []
    for one in (stream, turned):
        evictor = Evictor(Case(shape, Eviction("heavy-hitter", 2, 100)), 1, np.zeros(1, np.float32))
        for size in (11, 1, 1, 12, 5):
            evictor.call([one], [size], size)
        held.append(list(evictor.held(0)[0]))
    assert held[0] == held[1]
    assert held[0] != list(range(29, 23, -1)), "and not simply the newest"


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ("oldest", "'oldest' is not one of none, heavy-hitter, snapkv"),
        ({"policy": "heavy-hitter", "context": 0}, "context: 0 is not a positive number of tokens; give the"),
        ({"policy": "snapkv", "context": 8192, "recent": 0}, "recent: 0 is not a positive"),
        ({"policy": "snapkv", "context": 8192, "observe": "all"}, "observe: 'all' is not a positive"),
        ({"policy": "heavy-hitter", "context": 8192, "forget": 1.5}, "forget: 1.5 is not between 0 and 1"),
        ({"policy": "heavy-hitter", "context": 512}, "512 tokens are fewer than the window of 1020"),
        ({"policy": "heavy-hitter", "context": 8192, "recent": 1020}, "leave none of 1020 slots"),
        ({"policy": "heavy-hitter", "keep": 3}, "eviction.keep: unknown key; known are policy, recent"),
        (3, "3 is neither a policy nor a section"),
    ],
)
def test_impossible_policies_are_refused(section: object, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        AttentionScheme("streaming", eviction=section)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_states_its_context_unless_the_recipe_does(policy: str) -> None:
    asked = AttentionScheme("streaming", window=200, eviction=policy)
    assert asked.for_context(8192).eviction.context == 8192
    explicit = AttentionScheme("streaming", window=200, eviction={"policy": policy, "context": 4096})
    assert explicit.for_context(8192) == explicit.for_context(None) == explicit
    with pytest.raises(
        RecipeError, match=r"64 tokens are fewer than the window of 200; lower attention\.window"
    ):
        asked.for_context(64)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_needs_a_context_from_somewhere(policy: str) -> None:
    asked = AttentionScheme("streaming", eviction=policy)
    with pytest.raises(RecipeError, match="states no max_position_embeddings; give the length"):
        asked.for_context(None)
    with pytest.raises(RecipeError, match="give the length the model was trained on"):
        StreamAttention(asked)
    ring = AttentionScheme("streaming")
    assert ring.for_context(None) == ring, "a ring forgets by itself"
    StreamAttention(ring)


def test_quantized_caches_do_not_evict() -> None:
    scheme = AttentionScheme("streaming", eviction={"policy": "snapkv", "context": 8192})
    with pytest.raises(RecipeError, match="snapkv keeps tokens in floating point, not in int4"):
        StreamAttention(scheme, CacheFormat(4))
    StreamAttention(scheme)
