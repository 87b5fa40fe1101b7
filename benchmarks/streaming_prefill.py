"""Time per token of prompts of growing length: bounded cache beside dense attention, in ONNX Runtime.

    python benchmarks/streaming_prefill.py STREAMING.onnx [--dense DENSE.onnx] [--lengths 2048 8192 32768]

The streaming column should not depend on the length; the dense one grows with it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rotexport.runtime.model import OnnxModel
from rotexport.runtime.session import Session

DENSE_CALL = 256  # tokens per call, as a session reads them


def main() -> None:
    """Print one line per length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("streaming", type=Path)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--vocabulary", type=int, default=32000)
    options = parser.parse_args()
    session = Session(options.streaming)
    dense = OnnxModel(options.dense) if options.dense else None
    print(f"{'tokens':>8} {'streaming':>14} {'dense':>14}")
    for length in options.lengths:
        tokens = np.random.default_rng(0).integers(0, options.vocabulary, length)
        session.reset()
        streamed = _per_token(lambda tokens=tokens: session.prefill(tokens), length)
        whole = _per_token(lambda tokens=tokens: _read(dense, tokens), length) if dense else "-"
        print(f"{length:8} {streamed:>14} {whole:>14}", flush=True)


def _read(model: OnnxModel, tokens: np.ndarray) -> None:
    sizes = [min(DENSE_CALL, len(tokens) - start) for start in range(0, len(tokens), DENSE_CALL)]
    model.run_in_pieces(tokens[None], sizes)


def _per_token(work: Callable[[], object], length: int) -> str:
    start = time.perf_counter()
    work()
    return f"{1e3 * (time.perf_counter() - start) / length:.2f} ms/token"


if __name__ == "__main__":
    main()
