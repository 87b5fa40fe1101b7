"""Hopper's asynchronous instructions on the emulator: what they compute, and the bugs that it reports."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

NOT_DONE = "write of an operand of a product that is not known to be done"
BUGS = {
    "keys are not waited for": "of shared memory",
    "fewer bytes are expected than copied": "of shared memory",
    "buffers are released before products are done": NOT_DONE,
    "sums are read before products are done": "registers of a product that was not waited for",
    "weights change before products are done": "registers of a product that was not waited for",
    "registers are not fenced": "product of registers that were used since the last warpgroup_arrive",
    "operands are not fenced": "wrote without a proxy fence",
    "operands are fenced behind the barrier": "wrote without a proxy fence",
    "operands are written without a barrier": "of shared memory",
    "mbarriers are not fenced": "wrote without a proxy fence",
    "mbarriers are used without a barrier": "of shared memory",
    "the wrong phase is waited for": "of shared memory",
    "tiles lie at odd places": "a swizzled tile starts at a multiple of 1024 bytes",
    "half a warpgroup multiplies": "waits for its warpgroup in multiply_shared",
    "too many arrive": "more arrivals than the mbarrier counts",
    "products are never waited for": "ended with products that it never waited for",
    "barriers of other counts": "barrier 1 is met by ",
}
SCHEDULES = (0, 1, 2)
ROUNDS, ROWS, SIZE, KEYS = 2, 64, 128, 120


class Tiles:
    """Two rounds of products = query . keys^T and outputs = products . keys."""

    def __init__(self, build: Path) -> None:
        rng = np.random.default_rng(0)
        self.library = ctypes.CDLL(str(build / "librotexport_planted_bugs.so"))
        self.query = rng.standard_normal((ROUNDS, ROWS, SIZE)).astype(np.float16)
        self.keys = rng.standard_normal((ROUNDS, KEYS, SIZE)).astype(np.float16)
        self.products, self.outputs = np.zeros((2, ROUNDS, ROWS, SIZE), np.float32)

    def run(self, bug: str, schedule: int) -> str | None:
        """Return the emulator's report, None where it has nothing to say."""
        message = ctypes.create_string_buffer(1024)
        arrays = (self.query, self.keys, self.products, self.outputs)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        status = self.library.planted_warpgroup(
            bug.encode(), ctypes.c_uint64(schedule), *pointers, message, ctypes.c_size_t(1024)
        )
        return message.value.decode() if status else None


@pytest.fixture(scope="module")
def tiles(emulated: Path) -> Tiles:
    return Tiles(emulated)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS)
def test_reports_the_bug_under_any_schedule(tiles: Tiles, bug: str, schedule: int) -> None:
    report = tiles.run(bug, schedule)
    assert report is not None
    assert BUGS[bug] in report


@pytest.mark.parametrize("schedule", range(8))
def test_tiles_arrive_swizzled_and_products_read_them_so(tiles: Tiles, schedule: int) -> None:
    """Rows outside the tensor arrive as zeros. Products of halves are exact in float32, sums nearly."""
    assert tiles.run("none", schedule) is None
    query, keys = tiles.query.astype(np.float64), tiles.keys.astype(np.float64)
    held = np.pad(keys, ((0, 0), (0, SIZE - KEYS), (0, 0)))
    exact = query @ held.swapaxes(1, 2)
    bound = np.abs(query) @ np.abs(held).swapaxes(1, 2)
    assert np.all(np.abs(tiles.products - exact) <= SIZE * 2.0**-24 * bound)
    weights = tiles.products.astype(np.float16).astype(np.float64)
    assert np.all(
        np.abs(tiles.outputs - weights @ held) <= SIZE * 2.0**-24 * (np.abs(weights) @ np.abs(held))
    )
