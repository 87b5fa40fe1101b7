"""Sink/window attention on the emulator: outputs against float64, caches bit for bit, whatever the split into calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from attention_cases import Case, Session, Stream
from attention_checks import assert_caches_equal, assert_close, check_stream
from emulated import EmulatorError
from emulated_attention import EmulatedAttention
from fast_hadamard_cases import sylvester
from support.streams import ANGLES, Shape, operator_graph

from rotexport.graph.io import to_proto
from rotexport.streaming.oracle import Definition, Row, attend

TYPES = (np.float16, ml_dtypes.bfloat16)
FP8 = {"bits": 8, "fp8": True}
FORMATS = [{}, {"bits": 8}, {"bits": 4}, {"bits": 2}, FP8]
FORMATS += [{"bits": 8, "recent": 3}, {"bits": 4, "recent": 20}, {"bits": 2, "recent": 6}]
SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (112, 48), (16, 256)]
MORE_THAN_DECODED = 17  # the kernels decode up to 16 new tokens, and prefill more


@pytest.fixture(scope="module")
def kernels(emulated: Path) -> EmulatedAttention:
    return EmulatedAttention(emulated / "librotexport_emulated_kernels.so")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kept", FORMATS[:6], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size_type_and_format(
    kernels: EmulatedAttention, sizes: tuple[int, int], kept: dict[str, int], dtype: type
) -> None:
    """Prefill, then decode a few tokens around the ring, then prefill over what it holds."""
    case = Case(*sizes, repeat=2, dtype=dtype, **kept)
    check_stream(kernels, case, [[18], [3], [20]])


@pytest.mark.parametrize("kept", FORMATS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_ragged_calls_compute_the_definition(
    kernels: EmulatedAttention, kept: dict[str, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    window = int(rng.integers(max(kept.get("recent", 0), 1), 40))
    case = Case(
        *(64, 64, int(rng.integers(1, 3)), int(rng.choice([1, 2, 3, 5])), int(rng.integers(0, 6)), window),
        **kept,
        group=rng.choice([None, 16, 32]),
        softcap=float(rng.choice([0, 2.5])),
        decay=float(rng.choice([0, 0.5])),
        dtype=TYPES[seed % 2],
    )
    calls = [[int(n) for n in rng.choice([0, 1, 2, 16, 17, 45], size=2)] for _ in range(4)]
    check_stream(kernels, case, calls, seed)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("bits", "recent"), [(8, 0), (4, 0), (2, 0), (4, 5)])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (80, 37), (16, 240), (96, 1)], ids=str)
def test_centered_keys_of_every_size_and_format(
    kernels: EmulatedAttention, sizes: tuple[int, int], bits: int, recent: int, dtype: type
) -> None:
    """The mean at empty slots and padded tokens is NaN; as many angles as channels is the usual rotary embedding."""
    size, angles = sizes
    case = Case(size, size, repeat=2, bits=bits, recent=recent, dtype=dtype, angles=angles)
    check_stream(kernels, case, [[18], [3], [20]])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("bits", "recent"), [(8, 0), (4, 0), (2, 0), (4, 5)])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_rotated_queries_and_keys_of_every_size_and_format(
    kernels: EmulatedAttention, size: int, bits: int, recent: int, dtype: type
) -> None:
    """Sinks and recent tokens are stored rotated, too."""
    case = Case(size, 64, repeat=2, bits=bits, recent=recent, dtype=dtype, rotated=True)
    check_stream(kernels, case, [[18], [3], [20]])


@pytest.mark.parametrize("special", [{"angles": 40}, {"rotated": True}, {"angles": 64, "rotated": True}])
@pytest.mark.parametrize(("bits", "recent"), [(8, 3), (4, 0), (2, 6)])
@pytest.mark.parametrize("seed", range(2))
def test_ragged_calls_on_centered_and_rotated_keys(
    kernels: EmulatedAttention, seed: int, bits: int, recent: int, special: dict[str, int]
) -> None:
    case = Case(64, 64, 2, 3, 3, 23, bits, recent, 16, softcap=2.5, decay=0.5, dtype=TYPES[seed], **special)
    rng = np.random.default_rng(seed)
    check_stream(
        kernels, case, [[int(n) for n in rng.choice([0, 1, 2, 16, 17, 45], size=2)] for _ in range(4)]
    )


@pytest.mark.parametrize("kept", FORMATS[:5], ids=str)
@pytest.mark.parametrize("calls", [[70], [1] * 6 + [64], [33, 33, 4], [16, 16, 16, 16, 6]])
def test_any_split_into_calls_leaves_the_same_cache(
    kernels: EmulatedAttention, kept: dict[str, int], calls: list[int]
) -> None:
    """With 4 sinks and a window of 24 the ring wraps at different places in each of these."""
    check_stream(kernels, Case(sinks=4, window=24, **kept), [[n] for n in calls])


@pytest.mark.parametrize(("kv_heads", "group"), [(1, None), (3, None), (3, 32)])
def test_scales_of_fp8_may_end_within_a_word(
    kernels: EmulatedAttention, kv_heads: int, group: int | None
) -> None:
    """They have two bytes, and are copied four at a time: of a window of 21 one head's begin within a word."""
    case = Case(kv_heads=kv_heads, window=21, group=group, **FP8)
    check_stream(kernels, case, [[16], [9], [1], [20], [2]])


def test_fp8_keeps_every_number(kernels: EmulatedAttention) -> None:
    """Keys and values that are numbers themselves, with 448 in every group: their bytes are what is stored."""
    finite = np.setdiff1d(np.arange(256, dtype=np.uint8), [0x7F, 0x80, 0xFF]).view(ml_dtypes.float8_e4m3fn)
    case = Case(sinks=0, window=5, **FP8)
    stream = Stream(case, 5, np.random.default_rng(0))
    tokens = np.full((5, 64), 448, np.float16)
    tokens[:, 1:] = np.resize(finite, (5, 63))
    stream.key[:] = stream.value[:] = tokens
    session = Session(kernels, case, [stream])
    session.call([5])
    codes = tokens.astype(ml_dtypes.float8_e4m3fn).view(np.int8)
    for kind in ("key", "value"):
        np.testing.assert_array_equal(session.cache[f"window_{kind}"][0, 0], codes)
        np.testing.assert_array_equal(session.cache[f"window_{kind}_scale"], 1)


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 300), (1, 1), (64, 64), (70, 100)])
@pytest.mark.parametrize("kept", [{}, {"bits": 4}, FP8], ids=str)
def test_extreme_windows_over_many_tiles(
    kernels: EmulatedAttention, sinks: int, window: int, kept: dict[str, int]
) -> None:
    check_stream(kernels, Case(sinks=sinks, window=window, **kept), [[190], [1], [2]])


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"bits": 4},
        {"bits": 8, "recent": 3},
        {"bits": 2, "recent": 3, "angles": 24},
        {"bits": 4, "rotated": True},
        FP8,
    ],
)
@pytest.mark.parametrize("tokens", [2, 40])
def test_schedules_and_buffers_do_not_matter(
    kernels: EmulatedAttention, kept: dict[str, int], tokens: int
) -> None:
    case = Case(kv_heads=2, repeat=2, window=18, decay=0.1, **kept)
    rng = np.random.default_rng(0)
    streams = [Stream(case, 60, rng) for _ in range(2)]
    outcomes = []
    for schedule, in_place in [(0, True), (1, True), (2, False)]:
        session = Session(kernels, case, streams)
        session.call([20, 7])
        output = session.call([tokens, 1], schedule=schedule, in_place=in_place)
        outcomes.append({"output": output, **session.cache})
    assert_caches_equal(outcomes[1], outcomes[0])
    assert_caches_equal(outcomes[2], outcomes[0])


def test_tiles_that_nobody_sees_are_not_read(kernels: EmulatedAttention) -> None:
    """128 packed rows share tiles: behind the block of those that see a NaN no tile holds it."""
    case = Case(sinks=1, window=10)
    stream = Stream(case, 400, np.random.default_rng(0))
    expected = stream.expected()
    stream.value[:, 20] = np.nan
    output = Session(kernels, case, [stream]).call([400])[0]
    assert np.isnan(output[:, 20:30].astype(np.float32)).all()
    assert_close(case, stream_without_nan(stream), output[:, 128:], expected[:, 128:])


def stream_without_nan(stream: Stream) -> Stream:
    stream.value = np.nan_to_num(stream.value)
    return stream


@pytest.mark.parametrize("kept", [{}, {"bits": 4}, FP8], ids=str)
@pytest.mark.parametrize("tokens", [3, MORE_THAN_DECODED])
def test_rows_of_the_batch_do_not_leak(kernels: EmulatedAttention, kept: dict[str, int], tokens: int) -> None:
    """Between a NaN row and an infinite one, a row is what it is alone; slots that hold nothing are not read."""
    case = Case(repeat=2, **kept)
    rng = np.random.default_rng(0)
    alone = Stream(case, tokens, rng)
    wild = [Stream(case, tokens, rng) for _ in range(2)]
    for stream, poison in zip(wild, (np.nan, np.inf), strict=True):
        for tensor in (stream.query, stream.query_sink, stream.key, stream.value):
            tensor[:] = poison
    session = Session(kernels, case, [wild[0], alone, wild[1]])
    for tensor in session.cache.values():
        if tensor.dtype != np.int8:
            tensor[:] = np.nan
    output = session.call([tokens] * 3)
    assert_close(case, alone, output[1], alone.expected())


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("tokens", [1, MORE_THAN_DECODED])
def test_a_row_without_tokens_stays_as_it_is(
    kernels: EmulatedAttention, bits: int | None, tokens: int
) -> None:
    case = Case(bits=bits)
    session = Session(kernels, case, [Stream(case, 60, np.random.default_rng(row)) for row in range(2)])
    session.call([30, 11])
    before = {name: tensor[1].copy() for name, tensor in session.cache.items()}
    output = session.call([tokens, 0])
    assert not output[1].any()
    assert_caches_equal({name: tensor[1] for name, tensor in session.cache.items()}, before)


@pytest.mark.parametrize("kept", [{}, {"bits": 4}, FP8], ids=str)
@pytest.mark.parametrize("tokens", [1, MORE_THAN_DECODED])
def test_long_streams_are_as_exact_as_short_ones(
    kernels: EmulatedAttention, kept: dict[str, int], tokens: int
) -> None:
    """Whole turns of the ring later slots and distances are the same, so everything is, bit for bit."""
    case = Case(decay=0.3, **kept)
    stream = Stream(case, 40 + tokens, np.random.default_rng(0))
    session = Session(kernels, case, [stream])
    session.call([40])
    call = session.next_call([tokens], tokens, 0.0)
    later = replace(call, past_length=call.past_length + np.int32(10**7 * case.window))
    outcomes = [kernels.run(case.problem(1, tokens), one) for one in (call, later)]
    np.testing.assert_array_equal(outcomes[1][0], outcomes[0][0])
    assert_caches_equal(outcomes[1][1], outcomes[0][1])


@pytest.mark.parametrize("tokens", [4, MORE_THAN_DECODED])
def test_lengths_are_clamped_to_the_tensors(kernels: EmulatedAttention, tokens: int) -> None:
    """A builder times kernels on whatever its buffers hold."""
    case = Case(bits=4, recent=2)
    stream = Stream(case, tokens, np.random.default_rng(0))
    call = Session(kernels, case, [stream]).next_call([tokens], tokens, 0.0)
    whole, _ = kernels.run(case.problem(1, tokens), call)
    lengths = {"past_length": np.int32([-7]), "new_length": np.int32([2**31 - 1])}
    np.testing.assert_array_equal(kernels.run(case.problem(1, tokens), replace(call, **lengths))[0], whole)
    lengths = {"past_length": np.int32([2**31 - 1]), "new_length": np.int32([-1])}
    assert not kernels.run(case.problem(1, tokens), replace(call, **lengths))[0].any()


def test_the_reference_is_the_oracle(kernels: EmulatedAttention) -> None:
    """What these tests compare with is the oracle's definition, but for scales of narrow types."""
    case = Case(kv_heads=2, repeat=2, softcap=3.0, decay=0.4)
    stream = Stream(case, 50, np.random.default_rng(0))
    row = Row(*(torch.from_numpy(t) for t in (stream.query, stream.query_sink, stream.key, stream.value)))
    definition = Definition(case.sinks, case.window, case.scale, case.softcap)
    exact = attend(definition, row, torch.from_numpy(case.slopes)).numpy()
    np.testing.assert_allclose(stream.expected(), exact, rtol=0, atol=1e-12)


def rotated(graph: gs.Graph, size: int) -> gs.Graph:
    """Let a graph's one operator rotate queries and keys itself, by tables that are inputs too."""
    (node,) = graph.nodes
    node.op += "Rotated"
    tables = [gs.Variable("signs", np.float16, [size])]
    tables += [
        gs.Variable(n, np.int8, [order] * 2) for n, order in (("base", 1), ("hi", 8), ("lo", size // 8))
    ]
    node.inputs += tables
    graph.inputs += tables
    return graph


@pytest.mark.parametrize(
    "kept",
    [
        *({}, {"bits": 8}, {"bits": 4, "recent": 5}, {"bits": 2}, FP8),
        *({"bits": 4, "angles": ANGLES}, {"bits": 8, "recent": 5, "angles": ANGLES}),
        *({"bits": 2, "rotated": True}, {"bits": 8, "recent": 5, "rotated": True}),
        {"bits": 4, "recent": 5, "angles": ANGLES, "rotated": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [3, 30])
def test_the_kernel_computes_its_operators_body(
    kernels: EmulatedAttention, kept: dict[str, int], tokens: int
) -> None:
    """The body runs in float16 in ONNX Runtime: its caches are the kernel's, bit for bit."""
    case = Case(kv_heads=2, repeat=2, group=32 if kept else None, softcap=4.0, decay=0.2, **kept)
    d = Definition(
        *(case.sinks, case.window, case.scale, case.softcap, case.bits, case.group, case.recent, case.fp8)
    )
    shape = Shape(d, 2, 2, case.head_size, case.value_size, case.angles > 0)
    graph = operator_graph(shape, np.float16)
    model = to_proto(rotated(graph, case.head_size) if case.rotated else graph).SerializeToString()
    body = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    streams = [Stream(case, 80, np.random.default_rng(row)) for row in range(2)]
    for stream in streams if case.angles else []:  # ONNX Runtime would not round the difference to float16
        for name in ("key_mean",) if case.rotated else ("key", "key_mean"):  # few bits are rotated to few
            setattr(stream, name, (np.round(16 * getattr(stream, name)) / 16).astype(np.float16))
    session = Session(kernels, case, streams)
    session.call([40, 9])
    call = session.next_call([tokens, 2], tokens, 0.0)
    feeds = {name: getattr(call, name) for name in ("query", "query_sink", "key", "value", "decay")}
    feeds |= {"past_length": call.past_length, "new_length": call.new_length, **call.cache}
    feeds |= {name: np.nan_to_num(tensor) for name, tensor in call.others.items()}
    if case.rotated:
        feeds |= {"base": sylvester(1), "hi": sylvester(8), "lo": sylvester(case.head_size // 8)}
    feeds["positions"] = call.past_length[:, None] + np.arange(tokens, dtype=np.int64)
    expected = dict(zip((o.name for o in body.get_outputs()), body.run(None, feeds), strict=True))
    output = session.call([tokens, 2])
    for row, stream in enumerate(streams):
        assert_close(case, stream, output[row], expected["output"][row].astype(np.float64))
    assert_caches_equal(session.cache, {name: expected[f"present_{name}"] for name in session.cache})


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        (Case(head_size=72), "head_size is 72, the kernel needs a multiple of 16 up to 256"),
        (Case(value_size=272), "value_size is 272, the kernel needs a multiple of 16 up to 256"),
        (Case(window=0), "window is 0, a query sees at least itself"),
        (Case(bits=4, recent=21), "recent is 21, must lie between 1 and the window of 20"),
        (Case(recent=2), "recent is for windows of int8, int4 and int2 codes"),
        (Case(**FP8, recent=2), "recent is for windows of int8, int4 and int2 codes"),
        (
            Case(bits=8, group=8),
            "8 groups of a key head of 64 channels: the kernel needs groups of a multiple",
        ),
        (Case(128, 128, bits=4, group=16), "16 groups of a head's keys and values take more than 99 KB"),
        (Case(softcap=-1.0), "softcap is -1.000000, must not be negative"),
        (
            Case(256, 64, bits=4, angles=8),
            "8 angles of a head of 256 channels: the kernel needs at most 256 of both",
        ),
        (Case(angles=8), "centered and rotated keys are for windows of int8, int4 and int2 codes"),
        (Case(**FP8, rotated=True), "centered and rotated keys are for windows of int8, int4 and int2"),
        (
            Case(96, bits=4, rotated=True),
            "head_size is 96, the kernel rotates heads of a power of two channels",
        ),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(
    kernels: EmulatedAttention, case: Case, complaint: str
) -> None:
    stream = Stream(Case(), 1, np.random.default_rng(0))
    call = Session(kernels, Case(), [stream]).next_call([1], 1, 0.0)
    with pytest.raises(EmulatorError, match="SinkWindowAttention: ") as caught:
        kernels.run(case.problem(1, 1), call)
    assert complaint in str(caught.value)
