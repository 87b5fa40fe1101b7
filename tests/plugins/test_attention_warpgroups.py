"""Prefill on Hopper's warpgroups, on the emulator: what test_attention.py asks of the portable kernel, over more tiles."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from attention_cases import Case, Session, Stream
from attention_checks import assert_caches_equal, assert_close, check_stream
from emulated_attention import EmulatedAttention

TYPES = (np.float16, ml_dtypes.bfloat16)
FORMATS = [{}, {"bits": 8}, {"bits": 4}, {"bits": 2}, {"bits": 8, "fp8": True}]
FORMATS += [{"bits": 8, "recent": 3}, {"bits": 4, "recent": 140}]
SIZES = [(64, 64), (128, 128), (48, 64), (112, 48)]
KEYS, ROWS = 128, 128  # of a tile, of a block


class WarpgroupAttention(EmulatedAttention):
    """The kernels as on Hopper; calls of few tokens are decoded as anywhere."""

    function = "emulated_warpgroup_attention"

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        self._library = ctypes.CDLL(str(library))
        self._library.emulated_copied_tiles.restype = ctypes.c_size_t

    def copied_tiles(self) -> int:
        """Return how many boxes of 64 columns were copied so far."""
        return int(self._library.emulated_copied_tiles())

    def planned(self, case: Case, tokens: int, *, on_hopper: bool) -> bool:
        """Return whether the planner chooses warpgroups."""
        problem = case.problem(1, tokens)
        return bool(self._library.planned_on_warpgroups(ctypes.byref(problem), ctypes.c_int(on_hopper)))


@pytest.fixture(scope="module")
def kernels(emulated: Path) -> WarpgroupAttention:
    return WarpgroupAttention(emulated / "librotexport_emulated_kernels.so")


@pytest.mark.parametrize("kept", FORMATS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_size_type_and_format(
    kernels: WarpgroupAttention, sizes: tuple[int, int], kept: dict[str, int], dtype: type
) -> None:
    """A first chunk, and one over what the ring holds, which wraps; then tokens that are decoded from both."""
    case = Case(*sizes, sinks=3, window=150, dtype=dtype, **kept)
    check_stream(kernels, case, [[140], [60], [2]])


@pytest.mark.parametrize("kept", FORMATS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_ragged_calls_compute_the_definition(
    kernels: WarpgroupAttention, kept: dict[str, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    case = Case(
        *(*SIZES[seed], 1, int(rng.choice([1, 2, 3, 5])), int(rng.integers(0, 6))),
        int(rng.integers(max(kept.get("recent", 0), 1), 300)),
        **kept,
        group=rng.choice([None, 32]),
        softcap=float(rng.choice([0, 2.5])),
        decay=float(rng.choice([0, 0.5])),
        dtype=TYPES[seed % 2],
    )
    calls = [[int(n) for n in rng.choice([0, 1, 17, 45, 130, 180], size=2)] for _ in range(3)]
    check_stream(kernels, case, calls, seed)


@pytest.mark.parametrize("special", [{"angles": 40}, {"rotated": True}])
@pytest.mark.parametrize(("bits", "recent"), [(8, 30), (4, 0)])
def test_centered_and_rotated_keys(
    kernels: WarpgroupAttention, bits: int, recent: int, special: dict[str, int]
) -> None:
    """Rows that go on behind the head's channels are tiles of head 128; rotated ones come from the workspace."""
    case = Case(sinks=3, window=150, bits=bits, recent=recent, repeat=2, **special)
    check_stream(kernels, case, [[140, 20], [60, 90]])


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("calls", [[300], [150, 150], [17, 200, 83], [130, 3, 167]])
def test_any_split_into_calls_is_the_same(
    kernels: WarpgroupAttention, bits: int | None, calls: list[int]
) -> None:
    """With 4 sinks and a window of 200 the ring wraps inside tiles, between them, and not at all."""
    check_stream(kernels, Case(sinks=4, window=200, bits=bits, softcap=3.0), [[n] for n in calls])


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 400), (1, 1), (130, 64), (200, 140)])
def test_extreme_windows(kernels: WarpgroupAttention, sinks: int, window: int) -> None:
    check_stream(kernels, Case(sinks=sinks, window=window, repeat=2), [[290], [1], [40]])


@pytest.mark.parametrize(("size", "tokens"), [(64, 760), (128, 500)])
def test_buffers_are_used_again(kernels: WarpgroupAttention, size: int, tokens: int) -> None:
    """Heads of 64 have buffers for four tiles ahead, those of 128 for two."""
    check_stream(kernels, Case(size, size, window=700), [[tokens], [130]])


@pytest.mark.parametrize(("bits", "recent"), [(None, 0), (8, 30)])
def test_schedules_and_buffers_do_not_matter(
    kernels: WarpgroupAttention, bits: int | None, recent: int
) -> None:
    """Tiles arrive in other orders, threads take other turns; sums are taken in the same order."""
    case = Case(kv_heads=2, repeat=2, window=170, bits=bits, recent=recent, decay=0.1)
    rng = np.random.default_rng(0)
    streams = [Stream(case, 300, rng) for _ in range(2)]
    outcomes = []
    for schedule, in_place in [(0, True), (1, True), (2, False), (3, True)]:
        session = Session(kernels, case, streams)
        session.call([150, 40], schedule=schedule)
        output = session.call([140, 130], schedule=schedule, in_place=in_place)
        outcomes.append({"output": output, **session.cache})
    for outcome in outcomes[1:]:
        assert_caches_equal(outcome, outcomes[0])


def boxes(case: Case, tokens: int, first_key: list[int]) -> int:
    """Return how many copies of 64 columns the tiles of a prompt take, whose blocks see keys from `first_key` on."""
    tiles = 0
    for block, first in enumerate(first_key):
        last = min((block + 1) * ROWS // case.repeat, tokens) - 1
        tiles += 1 + -(-(last + 1 - first) // KEYS)  # the sinks' and the window's
    return tiles * 2 * case.head_size // 64


def test_tiles_in_a_row_are_copied_as_boxes(kernels: WarpgroupAttention) -> None:
    """Of a prompt that fills its tensor all tiles are; of a chunk that sees a wrap of the ring all but those at it."""
    case = Case(128, 128, sinks=4, window=300)
    stream = Stream(case, 700, np.random.default_rng(0))
    session = Session(kernels, case, [stream])
    before = kernels.copied_tiles()
    session.call([384])
    whole = kernels.copied_tiles() - before
    assert whole == boxes(case, 384, [4, 4, 4])
    before = kernels.copied_tiles()
    session.call([256])
    # Blocks of positions 384... and 512... see keys from 85 and 213 on: slots 81 to 299, then 0 to 79, then new
    # tokens. Tiles at 213 and 341 of the first wrap and leave the ring; so do those at 213 and 341 of the second.
    assert kernels.copied_tiles() - before == 4 * (1 + 4 - 2) + 4 * (1 + 4 - 2)


def test_rows_that_nobody_wrote_are_not_read(kernels: WarpgroupAttention) -> None:
    """Between a NaN row and an infinite one a row is what it is alone, whatever lies in empty slots and padding."""
    case = Case(repeat=2, window=200)
    rng = np.random.default_rng(0)
    alone = Stream(case, 230, rng)
    wild = [Stream(case, 230, rng) for _ in range(2)]
    for stream, poison in zip(wild, (np.nan, np.inf), strict=True):
        for tensor in (stream.query, stream.query_sink, stream.key, stream.value):
            tensor[:] = poison
    session = Session(kernels, case, [wild[0], alone, wild[1]])
    for tensor in session.cache.values():
        tensor[:] = np.nan
    expected = alone.expected()
    for past, tokens in ((0, 90), (90, 140)):
        output = session.call([tokens] * 3, tokens + 40)
        assert_close(case, alone, output[1, :, :tokens], expected[:, past : past + tokens])


def test_tiles_that_nobody_sees_are_not_read(kernels: WarpgroupAttention) -> None:
    case = Case(sinks=1, window=10)
    stream = Stream(case, 400, np.random.default_rng(0))
    expected = stream.expected()
    stream.value[:, 20] = np.nan
    output = Session(kernels, case, [stream]).call([400])[0]
    assert np.isnan(output[:, 20:30].astype(np.float32)).all()
    stream.value = np.nan_to_num(stream.value)
    assert_close(case, stream, output[:, ROWS:], expected[:, ROWS:])


def test_a_row_without_tokens_stays_as_it_is(kernels: WarpgroupAttention) -> None:
    case = Case(bits=8)
    session = Session(kernels, case, [Stream(case, 160, np.random.default_rng(row)) for row in range(2)])
    session.call([30, 11])
    before = {name: tensor[1].copy() for name, tensor in session.cache.items()}
    output = session.call([130, 0])
    assert not output[1].any()
    assert_caches_equal({name: tensor[1] for name, tensor in session.cache.items()}, before)


def test_long_streams_are_as_exact_as_short_ones(kernels: WarpgroupAttention) -> None:
    """Whole turns of the ring later slots and distances are the same, so everything is, bit for bit."""
    case = Case(window=140, decay=0.3)
    session = Session(kernels, case, [Stream(case, 300, np.random.default_rng(0))])
    session.call([170])
    call = session.next_call([130], 130, 0.0)
    later = replace(call, past_length=call.past_length + np.int32(10**6 * case.window))
    outcomes = [kernels.run(case.problem(1, 130), one) for one in (call, later)]
    np.testing.assert_array_equal(outcomes[1][0], outcomes[0][0])
    assert_caches_equal(outcomes[1][1], outcomes[0][1])


def test_the_planner_takes_warpgroups_where_they_pay(kernels: WarpgroupAttention) -> None:
    """On Hopper, for the sizes that have the kernel, with a block of rows and tiles to copy ahead."""
    usual = Case(128, 128, repeat=4, sinks=4, window=4092)
    assert kernels.planned(usual, 2048, on_hopper=True)
    assert kernels.planned(replace(usual, head_size=64, value_size=64, bits=4), 32, on_hopper=True)
    assert not kernels.planned(usual, 2048, on_hopper=False)
    assert not kernels.planned(usual, 16, on_hopper=True), "decoded"
    assert not kernels.planned(usual, 31, on_hopper=True), "less than a block of rows"
    assert not kernels.planned(replace(usual, window=400), 2048, on_hopper=True), "few tiles"
    for size in (80, 96, 256):
        assert not kernels.planned(replace(usual, value_size=size, head_size=size), 2048, on_hopper=True)
