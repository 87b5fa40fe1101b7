"""Layout and size of bounded caches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotexport.errors import RecipeError
from rotexport.streaming.cache import CacheFormat, LayerCache
from rotexport.streaming.oracle import pack

HALF = np.dtype(np.float16)


def cache(stored: CacheFormat, **sizes: int) -> LayerCache:
    numbers = {"kv_heads": 3, "head_size": 64, "value_size": 64, "sinks": 4, "window": 1020} | sizes
    return LayerCache(**numbers, format=stored, dtype=HALF)


def test_sizes_by_hand() -> None:
    """SmolLM2's heads: 2 (keys, values) x 3 heads x (4 sinks x 64 fp16 + 1020 slots)."""
    sinks = 2 * 3 * 4 * 64 * 2
    assert cache(CacheFormat()).nbytes == sinks + 2 * 3 * 1020 * 64 * 2
    assert cache(CacheFormat(8)).nbytes == sinks + 2 * 3 * 1020 * (64 + 4)
    assert cache(CacheFormat(4, 32)).nbytes == sinks + 2 * 3 * 1020 * (32 + 2 * 4)
    assert cache(CacheFormat(8, 16, fp8=True)).nbytes == sinks + 2 * 3 * 1020 * (64 + 4 * 2)
    assert cache(CacheFormat(2, 16, 128)).nbytes == sinks + 2 * 3 * (1020 * (16 + 4 * 4) + 128 * 64 * 2)


def test_tensors_follow_the_operators_inputs() -> None:
    tensors = cache(CacheFormat(4, 32, 128), value_size=96).tensors()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "sink_key": (3, 4, 64),
        "sink_value": (3, 4, 96),
        "window_key": (3, 1020, 32),
        "window_value": (3, 1020, 48),
        "window_key_scale": (3, 1020, 2, 2),
        "window_value_scale": (3, 1020, 3, 2),
        "recent_key": (3, 128, 64),
        "recent_value": (3, 128, 96),
    }
    assert tensors["window_key"].dtype == np.int8
    assert cache(CacheFormat(), sinks=0).tensors()["sink_key"].shape == (3, 1, 64), "inputs are never empty"


def test_a_recent_ring_is_no_longer_than_the_window() -> None:
    assert cache(CacheFormat(8, recent=128), window=16).tensors()["recent_key"].shape == (3, 16, 64)


@pytest.mark.parametrize(
    ("stored", "size", "named"), [(CacheFormat(4, 48), 64, "48"), (CacheFormat(2), 66, "66")]
)
def test_groups_and_bytes_must_fit(stored: CacheFormat, size: int, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        cache(stored, head_size=size, value_size=size).tensors()


@pytest.mark.parametrize("options", [{"recent": 16}, {"center": True}, {"bits": 4}], ids=str)
def test_fp8_is_stored_plainly(options: dict[str, int | bool]) -> None:
    with pytest.raises(RecipeError, match="fp8 stores every token"):
        CacheFormat(**{"bits": 8, "fp8": True} | options)


@given(st.sampled_from([8, 4, 2]), st.data())
def test_packed_levels_can_be_read_bit_by_bit(bits: int, data: st.DataObject) -> None:
    """Channel c of a byte's group sits in bits c b to c b + b - 1, in two's complement."""
    levels = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=8, max_size=8))
    stored = pack(torch.tensor(levels), bits).numpy().view(np.uint8)
    read = [int(stored[i * bits // 8]) >> (i * bits % 8) & (2**bits - 1) for i in range(8)]
    signed = [field - 2**bits if field >= 2 ** (bits - 1) else field for field in read]
    assert [value + 2 ** (bits - 1) for value in signed] == levels
