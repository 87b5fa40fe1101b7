"""The sink/window operators in ONNX Runtime against the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from support.streams import Caller, Shape, expected_cache, operator_graph, random_stream, run_stream

from rotexport.graph.io import to_proto
from rotexport.streaming.oracle import Definition, visible

TOLERANCE = 1e-5  # of the largest output: float32 against float64
Stored = tuple[int | str | None, int, bool]  # bits or fp8, recent tokens, centered keys
FORMATS: list[Stored] = [
    *((bits, 0, False) for bits in (None, 8, 4, 2, "fp8")),
    *((8, 2, False), (4, 3, False), (2, 5, False)),
    *((8, 0, True), (4, 0, True), (2, 0, True), (8, 2, True), (4, 1, True), (2, 5, True)),
]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def stored_in(bits: int | str | None) -> dict[str, int | bool | None]:
    return {"bits": 8, "fp8": True} if bits == "fp8" else {"bits": bits}


@st.composite
def shapes(draw: st.DrawFn, stored: Stored) -> Shape:
    bits, recent, center = stored
    head_size, value_size = draw(st.sampled_from([(8, 8), (16, 8), (8, 24), (64, 64)]))
    definition = Definition(
        sinks=draw(st.integers(0, 4)),
        window=draw(st.integers(max(recent, 1), 9)),
        scale=head_size**-0.5,
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        **stored_in(bits),
        group=None if bits is None else draw(st.sampled_from([None, 4, 8])),
        recent=recent,
    )
    return Shape(definition, draw(st.integers(1, 2)), draw(st.integers(1, 3)), head_size, value_size, center)


@pytest.mark.parametrize("stored", FORMATS, ids=str)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_ragged_calls_compute_the_definition(stored: Stored, data: st.DataObject) -> None:
    shape = data.draw(shapes(stored))
    batch = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    decay = rng.choice([0.0, 0.05, 1.0], shape.query_heads).astype(np.float32)
    streams = [random_stream(shape, 30, rng) for _ in range(batch)]
    expected = [stream.expected(shape, decay) for stream in streams]
    caller = Caller(shape, batch, decay)
    for _ in range(data.draw(st.integers(1, 5))):
        past = caller.past
        new = [data.draw(st.integers(0, min(14, 30 - p))) for p in past]
        size = max(*new, 1) + data.draw(st.integers(0, 2))
        output = caller.call(streams, new, size, rng)
        for row, (p, n) in enumerate(zip(past, new, strict=True)):
            assert not output[row, :, n:].any(), "padded queries have no output"
            if n > 0:
                assert_close(output[row, :, :n], expected[row][:, p : p + n])
    for name, content in expected_cache(shape, streams, list(caller.past)).items():
        ulps = (
            4 * np.finfo(np.float32).eps if name.endswith("_scale") else 0
        )  # two float32 roundings per step
        np.testing.assert_allclose(caller.cache[name], content, rtol=ulps, atol=0, err_msg=name)


@pytest.mark.parametrize("stored", FORMATS, ids=str)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 39)), sinks=st.integers(0, 4), window=st.integers(5, 16))
def test_any_split_into_calls_gives_the_same_outputs_and_cache(
    stored: Stored, cuts: set[int], sinks: int, window: int
) -> None:
    bits, recent, center = stored
    definition = Definition(sinks, window, scale=0.3, recent=recent, **stored_in(bits))
    shape = Shape(definition, kv_heads=2, repeat=2, center=center)
    rng = np.random.default_rng(sinks)
    stream = random_stream(shape, 40, rng)
    stream.key = rng.standard_normal(stream.key.shape).astype(np.float32)  # ties too: both runs are float32
    whole, whole_cache = run_stream(shape, stream, [40])
    parts, parts_cache = run_stream(shape, stream, list(np.diff([0, *sorted(cuts), 40])))
    assert_close(parts, whole)
    for name, content in whole_cache.items():
        np.testing.assert_array_equal(parts_cache[name], content, err_msg=name)


def test_without_sinks_and_within_the_window_it_is_causal_attention() -> None:
    shape = Shape(Definition(sinks=0, window=64, scale=8**-0.5), kv_heads=2, repeat=3)
    stream = random_stream(shape, 50, np.random.default_rng(0))
    query, key, value = (torch.from_numpy(t)[None].double() for t in (stream.query, stream.key, stream.value))
    causal = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    output, _ = run_stream(shape, stream, [20, 1, 29])
    assert_close(output, causal[0].numpy())


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 5), (1, 1), (3, 4), (4, 30)])
@pytest.mark.parametrize("calls", [[24], [1] * 24, [3, 7, 14]])
def test_the_mask_is_the_definitions_for_every_pair(sinks: int, window: int, calls: list[int]) -> None:
    """With equal logits and one-hot values, an output says which positions were seen."""
    shape = Shape(Definition(sinks, window, scale=1.0), head_size=8, value_size=24)
    stream = random_stream(shape, 24, np.random.default_rng(0))
    stream.query[:], stream.query_sink[:] = 0, 0
    stream.value = np.eye(24, dtype=np.float32)[None]
    output, _ = run_stream(shape, stream, calls)
    seen = [[j <= i and (j < sinks or i - j < window) for j in range(24)] for i in range(24)]
    np.testing.assert_array_equal(output[0] > 0, seen)
    np.testing.assert_array_equal(visible(24, sinks, window), seen)


def test_sinks_are_met_by_the_query_at_its_position_in_the_cache() -> None:
    shape = Shape(Definition(sinks=2, window=3, scale=1.0))
    stream = random_stream(shape, 12, np.random.default_rng(0))
    with_own, _ = run_stream(shape, stream, [12])
    stream.query_sink = stream.query
    with_same, _ = run_stream(shape, stream, [12])
    assert np.abs(with_own - with_same).max() > 0.1


def test_sinks_are_never_quantized() -> None:
    shape = Shape(Definition(sinks=4, window=3, scale=1.0, bits=2))
    stream = random_stream(shape, 9, np.random.default_rng(0))
    _, cache = run_stream(shape, stream, [9])
    np.testing.assert_array_equal(cache["sink_key"][0], stream.key[:, :4])


@pytest.mark.parametrize("calls", [[1] * 20, [7, 1, 1, 11]])
def test_garbage_beyond_a_rows_tokens_changes_nothing(calls: list[int]) -> None:
    shape = Shape(Definition(sinks=2, window=5, scale=1.0, bits=4))
    stream = random_stream(shape, 20, np.random.default_rng(3))
    alone, _ = run_stream(shape, stream, calls)
    caller = Caller(shape, 2)
    rng = np.random.default_rng(4)
    together = [caller.call([stream, stream], [size, 0], size + 3, rng)[0, :, :size] for size in calls]
    assert_close(np.concatenate(together, axis=1), alone)
    assert not any(content[1].any() for content in caller.cache.values()), "a row without tokens stays zeroed"


def test_the_reference_evaluator_runs_the_bodies_too() -> None:
    shape = Shape(Definition(sinks=2, window=5, scale=0.3, bits=4, group=4, recent=2), kv_heads=2, repeat=2)
    stream = random_stream(shape, 9, np.random.default_rng(0))
    feeds = {name: getattr(stream, name)[None] for name in ("query", "query_sink", "key", "value")}
    feeds |= {name: np.zeros((1, *t.shape), t.dtype) for name, t in shape.cache.tensors().items()}
    feeds |= {"past_length": np.zeros(1, np.int32), "new_length": np.full(1, 9, np.int32)}
    feeds |= {"positions": np.arange(9)[None], "decay": np.zeros(4, np.float32)}
    output = ReferenceEvaluator(to_proto(operator_graph(shape))).run(None, feeds)[0]
    assert_close(output[0], stream.expected(shape, feeds["decay"]))


def test_every_number_of_fp8_is_kept() -> None:
    """All finite bytes but -0, as keys whose largest is 448: scale 1, and what is stored is those bytes."""
    finite = torch.arange(-127, 127).to(torch.int8)
    finite = finite[finite.view(torch.float8_e4m3fn).float().isfinite()]
    heads = torch.cat([finite, finite.new_zeros(256 - len(finite))]).reshape(4, 64)
    heads[:, 0] = 126
    shape = Shape(Definition(0, 4, scale=1.0, bits=8, fp8=True), head_size=64, value_size=64)
    stream = random_stream(shape, 4, np.random.default_rng(0))
    stream.key = heads.view(torch.float8_e4m3fn).float().numpy()[None]
    _, cache = run_stream(shape, stream, [4])
    np.testing.assert_array_equal(cache["window_key"][0, 0], heads.numpy())
    np.testing.assert_array_equal(cache["window_key_scale"], 1)


@pytest.mark.parametrize("size", [2.0**-6, 1.0, 256.0])
def test_fp8_rounds_to_nearest_and_ties_to_even(size: float) -> None:
    """Thirty-second steps across the power of two `size`, where the distance of numbers doubles."""
    values = torch.full((1, 1, 64), 448.0)
    values[0, 0, 1:] = size * (1 + torch.arange(-31, 32) / 32)
    shape = Shape(Definition(0, 1, scale=1.0, bits=8, fp8=True), head_size=64, value_size=64)
    stream = random_stream(shape, 1, np.random.default_rng(0))
    stream.key = values.clamp(max=448).numpy()
    _, cache = run_stream(shape, stream, [1])
    expected = values.clamp(max=448).to(torch.float8_e4m3fn).view(torch.int8).numpy()
    np.testing.assert_array_equal(cache["window_key"][0, 0], expected[0])
