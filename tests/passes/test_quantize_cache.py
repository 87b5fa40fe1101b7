"""The quantized key/value cache in a graph, against a model in NumPy; prefill, chunks and steps agree."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import graph_of, ops, run

from rotexport.errors import GraphError, RecipeError
from rotexport.passes.quantize_cache import QuantizeCache
from rotexport.quant.scheme import CacheScheme

BATCH, HEADS = 2, 3


def attention_scores(head=8, dtype="float", extra="", outputs=""):
    """Keys and values appended to a cache, and read in full: scores q k^T, and the values as attended."""
    cache = "".join(
        f"{dtype}[batch, {HEADS}, past, {head}] past_key_values__0__{kind}, " for kind in ("key", "value")
    )
    presents = ", ".join(
        f"{dtype}[batch, {HEADS}, total, {head}] present__0__{kind}" for kind in ("key", "value")
    )
    return f"""cached ({cache} {dtype}[batch, {HEADS}, seq, {head}] q, {dtype}[batch, {HEADS}, seq, {head}] k,
        {dtype}[batch, {HEADS}, seq, {head}] v)
        => ({dtype}[batch, {HEADS}, seq, total] scores, {dtype}[batch, {HEADS}, total, {head}] values,
            {presents}{outputs})
        {{ present__0__key = Concat<axis = 2>(past_key_values__0__key, k)
           present__0__value = Concat<axis = 2>(past_key_values__0__value, v)
           kt = Transpose<perm = [0, 1, 3, 2]>(present__0__key)
           scores = MatMul(q, kt)
           values = Identity(present__0__value)
           {extra} }}"""


def attended(x, bits, group, clip=1.0):
    """Quantize and dequantize [..., head] per token and group, in float32; return levels and what they mean."""
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, group)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    minimum = low + (high - low) * np.float32((1 - clip) / 2)
    scale = np.maximum((high - low) * np.float32(clip / (2**bits - 1)), np.float32(2**-24))
    levels = np.clip(np.rint((groups - minimum) / scale), 0, 2**bits - 1)
    return levels.reshape(x.shape).astype(int), (levels * scale + minimum).reshape(x.shape)


def unpack(codes, bits):
    """Return the levels that int8 storage holds, with bit operations."""
    if bits == 8:
        return codes.astype(int) + 128
    low, high = codes.view(np.uint8) & 0xF, codes.view(np.uint8) >> 4
    nibbles = np.stack([low, high], axis=-1).reshape(*codes.shape[:-1], -1).astype(int)
    return np.where(nibbles >= 8, nibbles - 16, nibbles) + 8


def tokens(count, head=8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((BATCH, HEADS, count, head)).astype(dtype) for name in "qkv"}


def empty(graph):
    """Feed a cache of no tokens, shaped as the graph declares it."""
    return {
        tensor.name: np.zeros(
            (BATCH, *(0 if size == "past" else size for size in tensor.shape[1:])), tensor.dtype
        )
        for tensor in graph.inputs
        if tensor.name.startswith("past")
    }


def call(graph, feeds, past):
    """Run once; return the outputs by name and the next call's past."""
    results = dict(zip([t.name for t in graph.outputs], run(graph, **feeds, **past), strict=True))
    return results, {
        n.replace("present", "past_key_values"): v for n, v in results.items() if n[:7] == "present"
    }


SCHEMES = [("int8", 8, None, 1.0), ("int8", 8, 4, 1.0), ("int4", 4, None, 1.0), ("int4", 4, 2, 0.9)]


@pytest.mark.parametrize(("name", "bits", "group", "clip"), SCHEMES)
def test_what_is_attended_and_stored_is_the_quantized_token(name, bits, group, clip):
    graph = graph_of(attention_scores())
    report = QuantizeCache(CacheScheme(name, name, group, clip)).run(graph)
    assert report.changed == 2
    feeds = tokens(5)
    results, _ = call(graph, feeds, empty(graph))
    key_levels, keys = attended(feeds["k"], bits, group or 8, clip)
    value_levels, values = attended(feeds["v"], bits, group or 8, clip)
    assert np.array_equal(unpack(results["present.0.key"], bits), key_levels)
    assert np.array_equal(unpack(results["present.0.value"], bits), value_levels)
    assert np.allclose(results["values"], values, rtol=1e-6, atol=1e-6)
    scores = feeds["q"].astype(np.float64) @ keys.astype(np.float64).swapaxes(2, 3)
    assert np.allclose(results["scores"], scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "bits", "group", "clip"), SCHEMES)
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_prefill_chunks_and_single_steps_agree_bit_for_bit(name, bits, group, clip, dtype):
    graph = graph_of(attention_scores(dtype=dtype))
    QuantizeCache(CacheScheme(name, name, group, clip)).run(graph)
    feeds = tokens(7, dtype=np.float32 if dtype == "float" else np.float16)
    whole, cache = call(graph, feeds, empty(graph))
    for sizes in ((7,), (3, 4), (4, 1, 1, 1)):
        past = empty(graph)
        scores = []
        for start, stop in itertools.pairwise(np.cumsum([0, *sizes])):
            piece = {label: array[:, :, start:stop] for label, array in feeds.items()}
            results, past = call(graph, piece, past)
            scores.append(results["scores"])
        assert all(np.array_equal(past[port], cache[port]) for port in cache)
        assert np.array_equal(results["values"], whole["values"])
        # The product's order of summation may depend on its shape: rounding, no more.
        last = whole["scores"][:, :, -sizes[-1] :]
        assert np.allclose(scores[-1], last, rtol=1e-6 if dtype == "float" else 2e-3, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4)), seed=st.integers(0, 99),
    name=st.sampled_from(["int8", "int4"]), size=st.sampled_from([1e-6, 1.0, 1e4]),
)  # fmt: skip
def test_odd_shapes_and_sizes(shape, seed, name, size):
    groups, half_group, count = shape
    group = 2 * half_group
    graph = graph_of(attention_scores(groups * group))
    QuantizeCache(CacheScheme(name, name, group)).run(graph)
    feeds = {label: array * np.float32(size) for label, array in tokens(count, groups * group, seed).items()}
    feeds["v"][0, 0, 0] = 7 * size  # a constant group has no range
    results, _ = call(graph, feeds, empty(graph))
    _, values = attended(feeds["v"], 8 if name == "int8" else 4, group)
    assert np.allclose(results["values"], values, rtol=1e-5, atol=1e-6 * size)
    step = np.ptp(feeds["v"].reshape(*feeds["v"].shape[:3], groups, group), axis=-1).max()
    step = max(step / (255 if name == "int8" else 15), 2**-24)
    assert np.abs(results["values"] - feeds["v"]).max() <= 0.501 * step + 1e-6 * size


def test_ports_are_retyped_and_keep_their_order():
    graph = graph_of(attention_scores())
    QuantizeCache(CacheScheme("int4", "int8", 4)).run(graph)
    ports = [(t.name, np.dtype(t.dtype).name, list(t.shape)) for t in graph.inputs[:4]]
    assert ports == [
        ("past_key_values.0.key", "int8", ["batch", 3, "past", 4]),
        ("past_key_values.0.key_scale", "float32", ["batch", 3, "past", 2, 2]),
        ("past_key_values.0.value", "int8", ["batch", 3, "past", 8]),
        ("past_key_values.0.value_scale", "float32", ["batch", 3, "past", 2, 2]),
    ]
    assert [tensor.name for tensor in graph.outputs] == [
        "scores", "values", "present.0.key", "present.0.key_scale", "present.0.value", "present.0.value_scale",
    ]  # fmt: skip


def test_scales_are_kept_in_the_caches_float_type():
    graph = graph_of(attention_scores(dtype="float16"))
    QuantizeCache(CacheScheme("int8", "int8")).run(graph)
    assert {np.dtype(t.dtype).name for t in graph.inputs if t.name.endswith("scale")} == {"float16"}
    results, _ = call(graph, tokens(3, dtype=np.float16), empty(graph))
    assert results["values"].dtype == np.float16


@pytest.mark.parametrize("kind", ["key", "value"])
def test_one_of_both_can_stay_float(kind):
    graph = graph_of(attention_scores())
    report = QuantizeCache(CacheScheme(**{kind: "int8"})).run(graph)
    assert report.changed == 1
    types = {t.name: np.dtype(t.dtype).name for t in graph.inputs}
    other = "value" if kind == "key" else "key"
    assert types[f"past_key_values.0.{kind}"] == "int8"
    assert types[f"past_key_values.0.{other}"] == "float32"
    assert f"past_key_values.0.{other}_scale" not in types


def test_without_a_format_nothing_changes():
    graph = graph_of(attention_scores())
    before = ops(graph)
    assert QuantizeCache(CacheScheme()).run(graph).changed == 0
    assert ops(graph) == before


def test_the_past_length_may_still_be_read_from_the_cache():
    extra = "length = Shape<start = 2, end = 3>(past_key_values__0__key)"
    graph = graph_of(attention_scores(extra=extra, outputs=", int64[1] length"))
    QuantizeCache(CacheScheme("int4", "int4")).run(graph)
    results, past = call(graph, tokens(4), empty(graph))
    assert results["length"].tolist() == [0]
    assert call(graph, tokens(1), past)[0]["length"].tolist() == [4]


@pytest.mark.parametrize(
    ("scheme", "head", "words"),
    [
        (CacheScheme("int8", "none", 3), 8, "kv_cache.group: 3 does not divide .* use 2 or 4"),
        (CacheScheme("none", "int4"), 7, "kv_cache.value: int4 packs pairs"),
    ],
)
def test_impossible_schemes_are_refused_before_anything_changes(scheme, head, words):
    graph = graph_of(attention_scores(head))
    before = ops(graph)
    with pytest.raises(RecipeError, match=words):
        QuantizeCache(scheme).run(graph)
    assert ops(graph) == before


def test_a_cache_read_before_it_is_appended_to_is_refused():
    extra = "other = Abs(past_key_values__0__key)"
    graph = graph_of(attention_scores(extra=extra, outputs=", float[batch, 3, past, 8] other"))
    with pytest.raises(GraphError, match=r"past_key_values.0.key' is not appended to"):
        QuantizeCache(CacheScheme("int8", "int8")).run(graph)
