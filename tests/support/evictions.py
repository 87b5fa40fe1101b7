"""Streams through the operators that evict by attention, in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import torch
from support.streams import Shape, Stream

from rotexport.graph.io import to_proto
from rotexport.streaming.cache import FLOAT_CACHE, LayerCache
from rotexport.streaming.eviction import Eviction
from rotexport.streaming.eviction_oracle import Evicted, evict
from rotexport.streaming.oracle import Row


@dataclass(frozen=True)
class Case:
    """An operator's sizes and its policy."""

    shape: Shape
    policy: Eviction

    @property
    def cache(self) -> LayerCache:
        shape, d = self.shape, self.shape.definition
        sizes = (shape.kv_heads, shape.head_size, shape.value_size)
        return LayerCache(*sizes, d.sinks, d.window, FLOAT_CACHE, np.dtype(np.float32), self.policy)

    def expected(self, stream: Stream, calls: list[int], decay: np.ndarray) -> Evicted:
        row = Row(*(torch.from_numpy(t) for t in (stream.query, stream.query_sink, stream.key, stream.value)))
        return evict(self.shape.definition, self.policy, row, calls, torch.from_numpy(decay))


class Evictor:
    """An operator in a session of its own, with the cache of a batch."""

    def __init__(self, case: Case, batch: int, decay: np.ndarray) -> None:
        self.decay, self.session = decay, session(case)
        self.past = np.zeros(batch, np.int32)
        tensors = case.cache.tensors()
        self.cache = {name: np.zeros((batch, *t.shape), t.dtype) for name, t in tensors.items()}

    def call(self, streams: list[Stream], new: list[int], size: int) -> np.ndarray:
        """Feed the next new[b] tokens of each stream, padded to `size`; return [B, Hq, size, Dv]."""

        def padded(tensor: np.ndarray, past: int, count: int) -> np.ndarray:
            noise = np.full((tensor.shape[0], size - count, tensor.shape[2]), 7.0, np.float32)
            return np.concatenate([tensor[:, past : past + count], noise], axis=1)

        rows = list(zip(streams, self.past, new, strict=True))
        feeds = {
            name: np.stack([padded(getattr(s, name), p, n) for s, p, n in rows])
            for name in ("query", "query_sink", "key", "value")
        }
        feeds |= {"past_length": self.past, "new_length": np.array(new, np.int32), "decay": self.decay}
        feeds |= {"positions": self.past[:, None] + np.arange(size), **self.cache}
        output, *presents = self.session.run(None, feeds)
        self.cache = dict(zip(self.cache, presents, strict=True))
        self.past = self.past + np.array(new, np.int32)
        return output

    def held(self, row: int) -> list[dict[int, float]]:
        """Return the scores of held tokens by position, for each key head of a row."""
        memory = next(
            values for values in self.cache.values() if values.dtype == np.float32 and values.ndim == 3
        )
        heads = zip(self.cache["window_position"][row], memory[row], strict=True)
        return [{int(p) - 1: float(s) for p, s in zip(*head, strict=True) if p > 0} for head in heads]


@cache
def session(case: Case) -> ort.InferenceSession:
    shape, d = case.shape, case.shape.definition
    batch, tokens = "batch", "sequence"
    sizes = {"query_heads": shape.query_heads, "kv_heads": shape.kv_heads}
    sizes |= {"head_size": shape.head_size, "value_size": shape.value_size}
    queries = [batch, shape.query_heads, tokens, shape.head_size]
    inputs = [
        gs.Variable("positions", np.int64, [batch, tokens]),
        *(gs.Variable(name, np.float32, queries) for name in ("query", "query_sink")),
        gs.Variable("key", np.float32, [batch, shape.kv_heads, tokens, shape.head_size]),
        gs.Variable("value", np.float32, [batch, shape.kv_heads, tokens, shape.value_size]),
        *(gs.Variable(name, np.int32, [batch]) for name in ("past_length", "new_length")),
        gs.Variable("decay", np.float32, [shape.query_heads]),
    ]
    cached = [gs.Variable(n, t.dtype, [batch, *t.shape]) for n, t in case.cache.tensors().items()]
    outputs = [
        gs.Variable("output", np.float32, [batch, shape.query_heads, tokens, shape.value_size]),
        *(gs.Variable(f"present_{t.name}", t.dtype, t.shape) for t in cached),
    ]
    numbers = {"sinks": d.sinks, "window": d.window, "scale": d.scale, "softcap": d.softcap}
    attributes = numbers | sizes | case.policy.attributes
    node = gs.Node(
        case.cache.operator, "attention", attributes, [*inputs, *cached], outputs, domain="rotexport"
    )
    model = to_proto(gs.Graph([node], [*inputs, *cached], outputs, opset=23))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
