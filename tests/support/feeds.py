"""Inputs for the small decoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from support.models import HEAD, KV_HEADS, VOCAB


def decoder_feeds(
    graph: gs.Graph, batch: int = 2, sequence: int = 5, past: int = 3, seed: int = 1
) -> dict[str, Any]:
    """Return random tokens, angles, caches and a causal mask."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(0, 6, (batch, sequence, HEAD // 2)).astype(np.float32)
    hidden = np.arange(past + sequence) > np.arange(past, past + sequence)[:, None]
    feeds: dict[str, Any] = {
        "input_ids": rng.integers(0, VOCAB, (batch, sequence)),
        "mask": np.broadcast_to(
            np.where(hidden, -3e4, 0).astype(np.float32), (batch, 1, sequence, past + sequence)
        ),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    for tensor in graph.inputs:
        if tensor.name.startswith("past_key_values."):
            feeds[tensor.name] = rng.standard_normal((batch, KV_HEADS, past, HEAD)).astype(tensor.dtype)
    return {tensor.name: feeds[tensor.name].astype(tensor.dtype) for tensor in graph.inputs}
