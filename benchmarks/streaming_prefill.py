"""Time per token of prompts of growing length: bounded cache beside dense attention, in ONNX Runtime.

    python benchmarks/streaming_prefill.py STREAMING.onnx [--dense DENSE.onnx] [--lengths 2048 8192 32768]
        [--output benchmarks/results/streaming_prefill.json]

The streaming column should not depend on the length; the dense one grows with it, and ends with the positions
that the model was made for.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from rotexport.runtime.session import Session

DENSE_CALL = 256  # tokens per call, as a session reads them


def main() -> None:
    """Print one line per length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("streaming", type=Path)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--output", type=Path, help="a JSON file, written after each length")
    options = parser.parse_args()
    session = Session(options.streaming)
    dense = Session(options.dense, call_tokens=DENSE_CALL) if options.dense else None
    print(f"{'tokens':>8} {'streaming':>14} {'dense':>14}")
    lines = []
    for length in options.lengths:
        tokens = np.random.default_rng(0).integers(0, options.vocabulary, length)
        streamed = _per_token(session, tokens)
        fits = dense is not None and length <= dense.graph.last_position + 1
        whole = _per_token(dense, tokens) if dense and fits else None
        lines.append({"tokens": length, "streaming": streamed, "dense": whole, "load": os.getloadavg()[0]})
        print(f"{length:8} {_text(streamed):>14} {_text(whole):>14}", flush=True)
        if options.output is not None:
            options.output.write_text(json.dumps({"seconds_per_token": lines}, indent=1) + "\n")


def _per_token(session: Session, tokens: np.ndarray) -> float:
    session.reset()
    start = time.perf_counter()
    session.prefill(tokens)
    return (time.perf_counter() - start) / len(tokens)


def _text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f} ms/token"


if __name__ == "__main__":
    main()
