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

from rotexport.errors import ValidationError
from rotexport.evaluate import LanguageModel, next_token_logits, perplexity
from rotexport.metrics import log_softmax
from rotexport.progress import anonymous_bytes
from rotexport.runtime.session import Session

if TYPE_CHECKING:
    from rotexport.graph.weights import Array

BUCKET = 4096
DENSE_WINDOW = 1024
DENSE_STRIDE = 256

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
    window: int = DENSE_WINDOW,
    stride: int = DENSE_STRIDE,
    bucket: int = BUCKET,
) -> StreamEvaluation:
    """Predict every token of [N] by a dense model that reads the last `window` tokens anew each `stride`."""
    if not 0 < stride <= window:
        raise ValidationError(f"a stride of {stride} does not fit a window of {window} tokens")

    def predictions() -> Iterator[Array]:
        for start in range(0, len(tokens) - 1, stride):
            stop = min(start + stride, len(tokens) - 1)
            seen = tokens[max(0, stop - window) : stop]
            logits = next_token_logits(model, seen)[len(seen) - (stop - start) :]
            yield _losses(logits, tokens[start + 1 : stop + 1])

    return _collect(predictions(), tokens, bucket, None)


@contextmanager
def without_sinks(path: Path) -> Iterator[Path]:
    """Yield a copy of a streaming graph whose layers see their window only (weights stay shared)."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        if node.domain == "rotexport" and node.op_type.startswith("SinkWindowAttention"):
            for attribute in node.attribute:
                if attribute.name == "sinks":
                    attribute.i = 0
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
