"""The emulator reports planted bugs, and none in the same kernels without them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

BUGS = {
    "copy: reads past the end": "out-of-bounds read at bytes 256..259 of x (256 bytes), planted_bugs.cpp:",
    "copy: reads before the start": "out-of-bounds read of 4 bytes, 4 before the start of x",
    "copy: reads far outside": "out-of-bounds read of 4 bytes",
    "misaligned": "misaligned read at bytes 8..23 of x",
    "unwritten global": "read of memory that nothing wrote at bytes 0..3 of y",
    "shared bounds": "out-of-bounds write at bytes 256..259 of shared memory (256 bytes)",
    "unwritten shared": "read of memory that nothing wrote at bytes 252..255 of shared memory",
    "reverse: no barrier": " of shared memory (256 bytes), planted_bugs.cpp:",
    "reuse: no second barrier": "race: ",
    "reverse in warp: no barrier": " of shared memory (256 bytes), planted_bugs.cpp:",
    "reverse in warp: across warps": " of shared memory (256 bytes), planted_bugs.cpp:",
    "barrier: divergent": "divergent barrier: thread 0 waits at planted_bugs.cpp:",
    "barrier: partial": "waits at the barrier planted_bugs.cpp:",
    "shuffle: lanes missing": "waits for the lanes 0xffffffff in shuffle",
    "shuffle: own lane not in mask": "the mask of shuffle leaves out the calling lane",
    "collectives: mixed": "lanes of one warp meet in different operations",
    "asynchronous: no wait": "access before the asynchronous copy was waited for",
    "asynchronous: no barrier": "of shared memory",
    "blocks: overlap": "race: write not ordered after the write of thread",
    "ring: read and written": "race: ",
    "count: not atomic": "race: ",
}
CORRECT = [
    "copy",
    "misaligned: right",
    "shared bounds: right",
    "unwritten shared: right",
    "reverse",
    "reuse",
    "reverse in warp",
    "barrier",
    "barrier: all arrive",
    "shuffle",
    "collectives",
    "asynchronous",
    "blocks",
    "ring: read",
    "count",
]
SCHEDULES = (0, 1, 2)


class Planted:
    def __init__(self, build: Path) -> None:
        self.library = ctypes.CDLL(str(build / "librotexport_planted_bugs.so"))

    def run(self, case: str, schedule: int = 0, count: int = 1) -> tuple[str | None, np.ndarray]:
        """Return the emulator's report (None: nothing to report) and the first `count` outputs."""
        message = ctypes.create_string_buffer(1024)
        values = (ctypes.c_float * count)()
        status = self.library.planted_run(
            case.encode(), ctypes.c_uint64(schedule), count, values, message, ctypes.c_size_t(1024)
        )
        assert status != 2, f"no case '{case}'"
        return (message.value.decode() if status else None), np.array(values)


@pytest.fixture(scope="module")
def planted(emulated: Path) -> Planted:
    return Planted(emulated)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS)
def test_reports_the_bug_under_any_schedule(planted: Planted, bug: str, schedule: int) -> None:
    report, _ = planted.run(bug, schedule)
    assert report is not None
    assert BUGS[bug] in report


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CORRECT)
def test_reports_nothing_in_a_correct_kernel(planted: Planted, case: str, schedule: int) -> None:
    report, _ = planted.run(case, schedule)
    assert report is None


def test_a_report_names_thread_and_line(planted: Planted) -> None:
    report, _ = planted.run("copy: reads past the end")
    assert report is not None and report.startswith("thread 63 of block 0: ")


def test_half_a_warp_may_shuffle_alone(planted: Planted) -> None:
    report, values = planted.run("shuffle: half a warp", count=16)
    assert report is None
    np.testing.assert_array_equal(values, 1.0)


def test_reads_of_outputs_that_were_not_written_are_reported(planted: Planted) -> None:
    """Lanes 16 to 31 of "half a warp" write nothing."""
    report, _ = planted.run("shuffle: half a warp", count=17)
    assert report == "byte 64 of y (512 bytes) was never written"


def test_schedules_permute_the_threads(planted: Planted) -> None:
    """Float atomics round differently in each order, so a permuted schedule shows in the result."""
    sums = {float(planted.run("arrival order", schedule)[1][0]) for schedule in range(20)}
    assert len(sums) > 1
    np.testing.assert_allclose(list(sums), 0.1 * 64 * 65 / 2, rtol=1e-5)


def test_shared_memory_is_seen_across_a_barrier(planted: Planted) -> None:
    report, values = planted.run("reverse", count=64)
    assert report is None
    np.testing.assert_array_equal(values, np.arange(64)[::-1])


@pytest.mark.parametrize("transposed", ["", "transposed_"])
@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "half"), (ml_dtypes.bfloat16, "bfloat16")])
def test_matrix_instructions_multiply(planted: Planted, dtype: type, name: str, transposed: str) -> None:
    """ldmatrix and mma.m16n8k16 together: products of 11- or 8-bit significands are exact in float32, sums nearly."""
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((16, 16)).astype(dtype), rng.standard_normal((16, 8)).astype(dtype)
    y = np.empty((16, 8), np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (a, b, y)]
    getattr(planted.library, f"product_{transposed}{name}")(*pointers)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
    assert np.all(np.abs(y - exact) <= 16 * 2.0**-24 * bound)


def test_integer_matrix_instructions_multiply(planted: Planted) -> None:
    """mma.m16n8k32 of int8, the outermost values among them, is exact."""
    rng = np.random.default_rng(3)
    a = rng.integers(-128, 127, (16, 32), np.int8, endpoint=True)
    b = rng.integers(-128, 127, (8, 32), np.int8, endpoint=True)
    a[0], b[0] = -128, -128
    y = np.empty((16, 8), np.int32)
    planted.library.product_int8(*(ctypes.c_void_p(array.ctypes.data) for array in (a, b, y)))
    np.testing.assert_array_equal(y, a.astype(np.int64) @ b.astype(np.int64).T)


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "halves"), (ml_dtypes.bfloat16, "bfloat16s")])
def test_pairs_multiply_and_add_with_one_rounding(planted: Planted, dtype: type, name: str) -> None:
    compute = getattr(planted.library, f"multiply_add_{name}")
    compute.argtypes, compute.restype = [ctypes.c_uint32] * 3, ctypes.c_uint32
    a, b, c = np.random.default_rng(5).standard_normal((3, 200, 2)).astype(dtype)
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    words = zip(*(pairs.view(np.uint32)[:, 0] for pairs in (a, b, c)), strict=True)
    found = np.array([compute(*map(int, three)) for three in words], np.uint32).view(dtype).reshape(-1, 2)
    np.testing.assert_array_equal(found, exact.astype(dtype))


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "half"), (ml_dtypes.bfloat16, "bfloat16")])
def test_conversions_round_to_nearest_even(planted: Planted, dtype: type, name: str) -> None:
    """Every half, the midpoints between halves, and random floats, against NumPy's and ml_dtypes' conversions."""
    convert = getattr(planted.library, f"round_{name}")
    convert.argtypes, convert.restype = [ctypes.c_float], ctypes.c_uint16
    rng = np.random.default_rng(4)
    halves = np.arange(0, 0x7C00, 7, np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(over="ignore"):
        middles = (halves[1:] + halves[:-1]) / 2
        wild = rng.integers(0, 2**32, 2000, np.uint32).view(np.float32)
        values = np.concatenate(
            [halves, -middles, wild[np.isfinite(wild)], np.float32([65519.9, 65520, np.inf])]
        )
        expected = values.astype(dtype).view(np.uint16)
    np.testing.assert_array_equal([convert(float(value)) for value in values], expected)


def fp8_bytes() -> np.ndarray:
    """All bytes of float8e4m3fn, four to a word, each in every place: [256, 4]."""
    each = np.arange(256)
    return np.stack([each, (each + 77) % 256, (each + 130) % 256, 255 - each], -1).astype(np.uint8)


def test_float8_numbers_become_halves(planted: Planted) -> None:
    """The conversion of compute capability 8.9: every byte, NaN among them, in every place of a word."""
    pairs = np.empty((256, 2), np.uint32)
    for word, pair in zip(fp8_bytes().view(np.uint32)[:, 0], pairs, strict=True):
        planted.library.convert_fp8(ctypes.c_uint32(int(word)), ctypes.c_void_p(pair.ctypes.data))
    numbers = fp8_bytes().view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    np.testing.assert_array_equal(pairs.view(np.float16), numbers)


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "half"), (ml_dtypes.bfloat16, "bfloat16")])
def test_float8_numbers_are_widened_without_an_instruction(planted: Planted, dtype: type, name: str) -> None:
    """The upper bytes of both halves of a word; caches hold no NaN."""
    widen = getattr(planted.library, f"widen_upper_fp8_{name}")
    widen.argtypes, widen.restype = [ctypes.c_uint32], ctypes.c_uint32
    words = fp8_bytes().view(np.uint32)[:, 0]
    found = np.array([widen(int(word)) for word in words], np.uint32).view(dtype).reshape(256, 2)
    numbers = fp8_bytes()[:, 1::2].view(ml_dtypes.float8_e4m3fn).astype(dtype)
    finite = ~np.isnan(numbers.astype(np.float32))
    assert finite.sum() == 2 * 254
    np.testing.assert_array_equal(found[finite].astype(np.float32), numbers[finite].astype(np.float32))


def test_the_nearest_float8_number_is_found(planted: Planted) -> None:
    """Every number, what lies between two (of ties the even one), what surrounds that, and what is too large."""
    nearest = planted.library.nearest_fp8
    nearest.argtypes, nearest.restype = [ctypes.c_float], ctypes.c_uint32
    numbers = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (numbers[1:] + numbers[:-1]) / 2
    around = [np.nextafter(middles, np.float32(bound)) for bound in (0, 1000)]
    values = np.concatenate([numbers, middles, *around, np.float32([448, 464, 465, 1e30, np.inf, 1e-40])])
    expected = np.minimum(values, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal([nearest(float(value)) for value in values], expected)


def test_halves_widen_exactly(planted: Planted) -> None:
    widen = planted.library.widen_half
    widen.argtypes, widen.restype = [ctypes.c_uint16], ctypes.c_float
    bits = np.arange(0, 2**16, 5, np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal([widen(int(b)) for b in bits], expected)
