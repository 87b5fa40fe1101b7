"""What every test of sink/window attention asks: outputs near float64, caches bit for bit."""

from __future__ import annotations

import numpy as np
from attention_cases import Case, Session, Stream, allowed
from emulated_attention import EmulatedAttention


def assert_close(case: Case, stream: Stream, found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found.astype(np.float64) - expected).max() <= allowed(case, stream)


def assert_caches_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, content in expected.items():
        np.testing.assert_array_equal(found[name].view(np.int8), content.view(np.int8), err_msg=name)


def check_stream(kernels: EmulatedAttention, case: Case, calls: list[list[int]], seed: int = 0) -> None:
    """Run calls (new tokens of each row), and compare all outputs and the last cache with the definition."""
    rng = np.random.default_rng(seed)
    lengths = np.sum(calls, axis=0)
    streams = [Stream(case, max(length, 1), rng) for length in lengths]
    expected = [stream.expected() for stream in streams]
    session = Session(kernels, case, streams)
    for new in calls:
        past = session.past
        output = session.call(new, max(new) + int(rng.integers(3)), schedule=int(rng.integers(3)))
        for row, (p, n) in enumerate(zip(past, new, strict=True)):
            assert not output[row, :, n:].astype(np.float64).any(), "padded tokens have no output"
            if n > 0:
                assert_close(case, streams[row], output[row, :, :n], expected[row][:, p : p + n])
    for row, length in enumerate(lengths):
        held = {name: tensor[row] for name, tensor in session.cache.items()}
        assert_caches_equal(held, streams[row].expected_cache(length))
