"""One long stream through builds with different caches, in lockstep, beside a dense model that rereads.

    python benchmarks/streaming.py --text TEXT --tokens 60000 --output benchmarks/results/streaming.json \\
        --dense dense/ float=streaming/ int8=int8/ int4=int4/ int2=int2/

The first build is what the others are compared with; it runs a second time without its sinks (window only).
Whatever was read is in the output file after each bucket, so a run may be cut short. Perplexities of a bucket
are over its tokens; time is of the follower alone, memory (RssAnon) of the process with all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from rotexport.metrics import log_softmax
from rotexport.progress import anonymous_bytes
from rotexport.runtime.session import Session
from rotexport.streaming.evaluate import Rereading, without_sinks

DENSE, WINDOW_ONLY = "dense", "window-only"


def main() -> None:
    """Follow the stream bucket by bucket; print and write as it goes."""
    options = _options()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokens = np.array(tokenizer(options.text.read_text("utf-8"))["input_ids"][: options.tokens + 1])
    builds = dict(build.split("=", maxsplit=1) for build in options.builds)
    with ExitStack() as stack:
        first = next(iter(builds))
        copy = stack.enter_context(without_sinks(Path(builds[first]) / "model.onnx"))
        followers: dict[str, Follower] = {name: Stream(tokens, Path(path)) for name, path in builds.items()}
        followers[WINDOW_ONLY] = Stream(tokens, copy)
        if options.dense is not None:
            followers[DENSE] = Dense(tokens, options.dense)
        memory: list[int | None] = []
        for start in range(0, len(tokens) - 1, options.bucket):
            stop = min(start + options.bucket, len(tokens) - 1)
            for follower in followers.values():
                follower.follow(start, stop)
            memory.append(anonymous_bytes())
            figures = {name: follower.figures(followers[first]) for name, follower in followers.items()}
            _print(stop, figures)
            result = {
                "tokens": stop,
                "bucket": options.bucket,
                "load": os.getloadavg()[1],
                "text": options.text.name,
            }
            result |= {"anonymous_bytes": memory, "bytes_per_token": _slope(memory, options.bucket)}
            options.output.write_text(json.dumps(result | {"followers": figures}, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("builds", nargs="+", metavar="NAME=BUILD")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="a directory with the model's tokenizer")
    parser.add_argument("--tokens", type=int, default=60000)
    parser.add_argument("--bucket", type=int, default=4096)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


@dataclass
class Follower:
    """Something that predicts a stream of `tokens`; seconds per token of each bucket.

    Losses have their memory from the start, so that what a stream takes is not counted with its own record.
    """

    tokens: np.ndarray
    done: int = 0
    losses: np.ndarray = field(init=False)
    seconds: list[float] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        self.losses = np.zeros(len(self.tokens) - 1)

    def follow(self, start: int, stop: int) -> None:
        """Predict tokens start + 1 ... stop."""
        clock = time.perf_counter()
        for logits in self.logits(start, stop):
            done, self.done = self.done, self.done + len(logits)
            targets = self.tokens[done + 1 : self.done + 1]
            self.losses[done : self.done] = -np.take_along_axis(
                log_softmax(logits), targets[:, None], axis=-1
            )[:, 0]
        self.seconds.append((time.perf_counter() - clock) / (stop - start))
        self.ends.append(stop)

    def logits(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield logits [n, vocabulary] after tokens start ... stop - 1."""
        raise NotImplementedError

    def figures(self, other: Follower) -> dict[str, Any]:
        """Return perplexities, and what they are more than another's, in all and by bucket."""
        starts = [0, *self.ends[:-1]]
        own = [float(np.mean(self.losses[a:b])) for a, b in zip(starts, self.ends, strict=True)]
        others = [float(np.mean(other.losses[a:b])) for a, b in zip(starts, self.ends, strict=True)]
        loss, other_loss = (float(np.mean(one.losses[: one.done])) for one in (self, other))
        return {
            "perplexity": float(np.exp(loss)),
            "excess": float(np.expm1(loss - other_loss)),
            "buckets": [float(value) for value in np.exp(own)],
            "bucket_excess": [float(value) for value in np.expm1(np.subtract(own, others))],
            "seconds_per_token": self.seconds,
            "cache_bytes": self.cache_bytes,
        }


class Stream(Follower):
    """A build with a bounded cache."""

    def __init__(self, tokens: np.ndarray, path: Path) -> None:
        super().__init__(tokens)
        self._graph = Session(path).graph
        self.cache_bytes = self._graph.cache_bytes

    def logits(self, start: int, stop: int) -> Iterator[np.ndarray]:
        for _, logits in self._graph.forward(self.tokens[start:stop]):
            yield logits


class Dense(Follower):
    """A build with a growing cache, which reads anew instead of keeping it."""

    def __init__(self, tokens: np.ndarray, path: Path) -> None:
        super().__init__(tokens)
        self._graph, self._reading = Session(path).graph, Rereading()

    def logits(self, start: int, stop: int) -> Iterator[np.ndarray]:
        for begin in range(start, stop, self._reading.stride):
            end = min(begin + self._reading.stride, stop)
            seen = self.tokens[max(0, end - self._reading.window) : end]
            yield self._graph.logits(seen)[len(seen) - (end - begin) :]


def _slope(memory: list[int | None], bucket: int) -> float | None:
    """Return bytes per token by least squares, the first bucket (buffers still growing) left out."""
    known = [value for value in memory[1:] if value is not None]
    if len(known) < 2:
        return None
    return float(np.polyfit(np.arange(len(known)) * bucket, known, 1)[0])


def _print(stop: int, figures: dict[str, dict[str, Any]]) -> None:
    print(f"{stop} tokens")
    for name, found in figures.items():
        print(
            f"  {name:12} {found['perplexity']:9.3f} {100 * found['excess']:+8.2f} %   this bucket "
            f"{found['buckets'][-1]:9.3f} {100 * found['bucket_excess'][-1]:+8.2f} %   "
            f"{1e3 * found['seconds_per_token'][-1]:7.1f} ms/token",
            flush=True,
        )


if __name__ == "__main__":
    main()
