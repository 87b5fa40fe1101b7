"""Perplexity over one continuous stream with a running cache, by position, beside a dense model re-run.

The dense reference has no cache: for every `stride` tokens it reads the last `window` tokens anew and only
those `stride` predictions count, so each is made from `window - stride` tokens or more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import numpy_helper

from rotexport.errors import ValidationError
from rotexport.evaluate import LanguageModel, next_token_logits, perplexity
from rotexport.graph.functions import DOMAIN
from rotexport.metrics import log_softmax
from rotexport.passes.stream_interface import RING_SLOTS, ring_slots
from rotexport.progress import anonymous_bytes
from rotexport.runtime.session import Session

if TYPE_CHECKING:
    from rotexport.graph.weights import Array

BUCKET = 4096

Advance: TypeAlias = "Callable[[int, int], None]"


@dataclass(frozen=True)
class Bucket:
    """What happened while the tokens at positions `start` to `stop` (exclusive) were predicted.

    `anonymous_bytes` is the memory of the process at its end, None where the system does not tell.
    """

    start: int
    stop: int
    loss: float
    perplexity: float
    seconds_per_token: float
    anonymous_bytes: int | None


@dataclass(frozen=True)
class StreamEvaluation:
    """Perplexity over a whole stream and by position; `cache_bytes` is None for a model without a cache."""

    perplexity: float
    loss: float
    tokens: int
    cache_bytes: int | None
    buckets: tuple[Bucket, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Rereading:
    """How a model without a cache follows a stream: every `stride` tokens it reads the last `window` anew."""

    window: int = 1024
    stride: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.window:
            raise ValidationError(f"a stride of {self.stride} does not fit a window of {self.window} tokens")


@dataclass(frozen=True)
class StreamComparison:
    """A text read as one stream by a build, by the same build without its sinks, and by the dense model.

    `window_only` is None where a build has no sinks, `dense` where the dense model was left out.
    """

    text: str
    stream: StreamEvaluation
    window_only: StreamEvaluation | None = None
    dense: StreamEvaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the stream's own fields, and the others' beside them, ready for JSON."""
        others = {"window_only": self.window_only, "dense": self.dense}
        beside = {name: found and found.to_dict() for name, found in others.items()}
        return {"text": self.text, **self.stream.to_dict(), **beside}


def evaluate_stream(
    session: Session, tokens: Array, bucket: int = BUCKET, advance: Advance = lambda done, of: None
) -> StreamEvaluation:
    """Read `tokens` [N] as one stream from an empty cache.

    Raises:
        ValidationError: there are fewer than two tokens, or a probability is not a number.

    """
    session.reset()

    def predictions() -> Iterator[Array]:
        position = 0
        for piece, logits in session.graph.forward(tokens[:-1]):
            position += len(piece)
            yield _losses(logits, tokens[position - len(piece) + 1 : position + 1])
            advance(position, len(tokens) - 1)

    return _collect(predictions(), tokens, bucket, session.cache_bytes)


def evaluate_dense(
    model: LanguageModel,
    tokens: Array,
    bucket: int = BUCKET,
    advance: Advance = lambda done, of: None,
    reading: Rereading | None = None,
) -> StreamEvaluation:
    """Predict every token of [N] by a dense model that has no cache, and reads anew instead."""
    reading = reading or Rereading()

    def predictions() -> Iterator[Array]:
        for start in range(0, len(tokens) - 1, reading.stride):
            stop = min(start + reading.stride, len(tokens) - 1)
            seen = tokens[max(0, stop - reading.window) : stop]
            logits = next_token_logits(model, seen)[len(seen) - (stop - start) :]
            yield _losses(logits, tokens[start + 1 : stop + 1])
            advance(stop, len(tokens) - 1)

    return _collect(predictions(), tokens, bucket, None)


@contextmanager
def without_sinks(path: Path) -> Iterator[Path]:
    """Yield a copy of a streaming graph whose layers see their window only (weights stay shared)."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.domain == DOMAIN and attribute.name == "sinks":
                attribute.i = 0
    for tensor in model.graph.initializer:
        ring = RING_SLOTS.match(tensor.name)
        if ring is not None:
            tensor.CopyFrom(numpy_helper.from_array(ring_slots(0, int(ring["window"])), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.name.rpartition(".")[2] in ("sink_key", "sink_value"):
            value.type.tensor_type.shape.dim[2].dim_value = 1  # max(sinks, 1) slots
    copy = path.with_name(f"{path.stem}.window-only.onnx")
    copy.write_bytes(model.SerializeToString())
    try:
        yield copy
    finally:
        copy.unlink()


def _losses(logits: Array, targets: Array) -> Array:
    losses: Array = -np.take_along_axis(log_softmax(logits), targets[:, None], axis=-1)[:, 0]
    return losses


def _collect(
    predictions: Iterator[Array], tokens: Array, bucket: int, cache_bytes: int | None
) -> StreamEvaluation:
    if len(tokens) < 2:
        raise ValidationError(f"a stream of {len(tokens)} tokens predicts nothing; give a longer text")
    losses = np.empty(len(tokens) - 1)
    done, clock = 0, time.perf_counter()
    buckets: list[Bucket] = []
    for part in predictions:
        losses[done : done + len(part)] = part
        done += len(part)
        start = len(buckets) * bucket
        while done - start >= bucket or done == len(losses):
            stop = min(start + bucket, done)
            now = time.perf_counter()
            mean = float(losses[start:stop].mean())
            pace = (now - clock) / (stop - start)
            buckets.append(Bucket(start + 1, stop + 1, mean, perplexity(mean), pace, anonymous_bytes()))
            start, clock = stop, now
            if start == len(losses):
                break
    loss = float(losses.mean())
    if not np.isfinite(loss):
        raise ValidationError(f"the loss over {len(losses)} tokens is {loss}: logits are not all finite")
    return StreamEvaluation(perplexity(loss), loss, len(losses), cache_bytes, tuple(buckets))
