"""Streams through the sink/window operators in ONNX Runtime, call by call, and what the definition says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import torch

from rotexport.graph.io import to_proto
from rotexport.streaming.cache import CacheFormat, LayerCache
from rotexport.streaming.oracle import Definition, Row, attend, pack, quantize, ring_positions, to_fp8

ANGLES = 3


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of one operator, beside the numbers of its definition."""

    definition: Definition
    kv_heads: int = 1
    repeat: int = 1
    head_size: int = 8
    value_size: int = 8
    center: bool = False

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.repeat

    @property
    def cache(self) -> LayerCache:
        d = self.definition
        stored = CacheFormat(d.bits, d.group, d.recent, self.center, d.fp8)
        sizes = (self.kv_heads, self.head_size, self.value_size)
        return LayerCache(*sizes, d.sinks, d.window, stored, np.dtype(np.float32))

    @property
    def mean_map(self) -> np.ndarray:
        """What makes a mean key of angles: [Hk, D, ANGLES]."""
        shape = (self.kv_heads, self.head_size, ANGLES)
        return np.random.default_rng(9).integers(-8, 8, shape).astype(np.float32) / 8

    def key_means(self, length: int) -> np.ndarray:
        """The mean [Hk, N, D] at each position; few bits, so that float32 holds it exactly."""
        return np.einsum("hdr,nr->hnd", self.mean_map, angles(np.arange(length)))


def angles(positions: np.ndarray) -> np.ndarray:
    """Some function of positions [...]: [..., ANGLES]."""
    return np.stack([positions % 5 - 2, positions % 3 - 1, positions * 0 + 1], -1).astype(np.float32) / 4


@dataclass
class Stream:
    """One row: queries [Hq, N, D], keys [Hk, N, D], values [Hk, N, Dv]."""

    query: np.ndarray
    query_sink: np.ndarray
    key: np.ndarray
    value: np.ndarray

    @property
    def length(self) -> int:
        return self.key.shape[1]

    def expected(self, shape: Shape, decay: np.ndarray) -> np.ndarray:
        row = Row(*(torch.from_numpy(t) for t in (self.query, self.query_sink, self.key, self.value)))
        mean = torch.from_numpy(shape.key_means(self.length)) if shape.center else None
        return attend(shape.definition, row, torch.from_numpy(decay), mean).numpy()


def random_stream(shape: Shape, length: int, rng: np.random.Generator) -> Stream:
    def normal(heads: int, size: int) -> np.ndarray:
        return rng.standard_normal((heads, length, size)).astype(np.float32)

    d = shape.definition
    queries = (normal(shape.query_heads, shape.head_size) for _ in range(2))
    if d.bits is None:
        return Stream(
            *queries, normal(shape.kv_heads, shape.head_size), normal(shape.kv_heads, shape.value_size)
        )

    def stored(size: int) -> np.ndarray:
        sizes, group = (shape.kv_heads, length, size), d.group or size
        return fp8_off_ties(sizes, group, rng) if d.fp8 else off_ties(sizes, d.bits, group, rng)

    return Stream(*queries, stored(shape.head_size), stored(shape.value_size))


def off_ties(shape: tuple[int, ...], bits: int, group: int, rng: np.random.Generator) -> np.ndarray:
    """Return values at most a third of a step from their level: float32 and float64 round them alike."""
    levels = rng.integers(0, 2**bits, (*shape[:-1], shape[-1] // group, group)).astype(float)
    levels += rng.uniform(-0.33, 0.33, levels.shape)
    levels[..., 0], levels[..., 1] = 0, 2**bits - 1
    step = rng.uniform(0.5, 2, (*levels.shape[:-1], 1)) * 3 / 2**bits
    values = rng.permuted(levels, axis=-1) * step + rng.normal(size=step.shape)
    return values.reshape(shape).astype(np.float32)


def fp8_off_ties(shape: tuple[int, ...], group: int, rng: np.random.Generator) -> np.ndarray:
    """Return values at most a third of the way to the next float8 number: both precisions round them alike."""
    sizes = (*shape[:-1], shape[-1] // group, group)
    bytes_ = torch.from_numpy(rng.integers(-127, 127, sizes).astype(np.int8))  # -127 ... 126: all but NaN, -0
    numbers = bytes_.view(torch.float8_e4m3fn).float().nan_to_num().numpy()
    quanta = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(numbers), 2**-6))) - 3)
    inward = np.sign(numbers) * quanta * rng.uniform(0, 0.15, sizes)  # below a power of two quanta halve
    numbers = numbers - inward
    numbers[..., 0] = 448
    scales = rng.uniform(0.5, 2, (*sizes[:-1], 1)) / 448
    return (rng.permuted(numbers, axis=-1) * scales).reshape(shape).astype(np.float32)


class Caller:
    """An operator in a session of its own, with the cache of a batch."""

    def __init__(self, shape: Shape, batch: int, decay: np.ndarray | None = None) -> None:
        self.shape = shape
        self.decay = np.zeros(shape.query_heads, np.float32) if decay is None else decay
        self.session = session(shape)
        self.past = np.zeros(batch, np.int32)
        self.cache = {
            name: np.zeros((batch, *tensor.shape), tensor.dtype)
            for name, tensor in shape.cache.tensors().items()
        }

    def call(self, streams: list[Stream], new: list[int], size: int, rng: np.random.Generator) -> np.ndarray:
        """Feed the next new[b] tokens of each stream, padded with noise to `size`; return [B, Hq, size, Dv]."""

        def padded(tensor: np.ndarray, past: int, count: int) -> np.ndarray:
            noise = rng.standard_normal((tensor.shape[0], size - count, tensor.shape[2])).astype(np.float32)
            return np.concatenate([tensor[:, past : past + count], noise], axis=1)

        feeds = {
            name: np.stack(
                [padded(getattr(s, name), p, n) for s, p, n in zip(streams, self.past, new, strict=True)]
            )
            for name in ("query", "query_sink", "key", "value")
        }
        lengths = {"past_length": self.past, "new_length": np.array(new, np.int32)}
        positions = self.past[:, None] + np.arange(size)
        others = {"decay": self.decay}
        if self.shape.center:
            others |= self._means(feeds["query"], positions)
        output, *presents = self.session.run(
            None, {**feeds, **lengths, **others, **self.cache, "positions": positions}
        )
        self.cache = dict(zip(self.cache, presents, strict=True))
        self.past = self.past + np.array(new, np.int32)
        return output

    def _means(self, query: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Return what operators that center keys are told of the mean."""
        d, table = self.shape.definition, self.shape.mean_map
        held = np.array([[j or 0 for j in ring_positions(p, d.sinks, d.window)] for p in self.past])
        return {
            "key_mean": np.einsum("hdr,bsr->bhsd", table, angles(positions)),
            "mean_query": np.einsum("bhsd,hdr->bhsr", query, table.repeat(self.shape.repeat, 0)),
            "mean_angles": np.concatenate([angles(held), angles(positions)], 1),
        }


def run_stream(
    shape: Shape, stream: Stream, calls: list[int], decay: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run one row in calls of the given sizes; return its outputs [Hq, N, Dv] and the final cache."""
    caller = Caller(shape, 1, decay)
    rng = np.random.default_rng(0)
    outputs = [caller.call([stream], [size], size, rng)[0] for size in calls]
    return np.concatenate(outputs, axis=1), caller.cache


def expected_cache(shape: Shape, streams: list[Stream], lengths: list[int]) -> dict[str, np.ndarray]:
    """Return the cache that the definition asks for after `lengths` tokens of each row."""
    rows = [_row_cache(shape, stream, length) for stream, length in zip(streams, lengths, strict=True)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _row_cache(shape: Shape, stream: Stream, length: int) -> dict[str, np.ndarray]:
    d = shape.definition
    row = {}
    for kind in ("key", "value"):
        tensor = torch.from_numpy(getattr(stream, kind))
        heads, _, size = tensor.shape
        sinks = torch.zeros(heads, max(d.sinks, 1), size)
        held = min(d.sinks, length)
        sinks[:, :held] = tensor[:, :held]
        row[f"sink_{kind}"] = sinks.numpy()
        if d.bits is None:
            stored = {f"window_{kind}": tensor}
        elif d.fp8:
            floats = to_fp8(tensor, d.group or size)
            stored = {
                f"window_{kind}": floats.numbers.view(torch.int8),
                f"window_{kind}_scale": floats.scales[..., None].float(),
            }
        else:
            centered = kind == "key" and shape.center
            mean = torch.from_numpy(shape.key_means(tensor.shape[1])) if centered else torch.zeros(())
            grid = quantize(tensor - mean, d.bits, d.group or size)
            stored = {
                f"window_{kind}": pack(grid.levels, d.bits),
                f"window_{kind}_scale": torch.stack([grid.steps, grid.minima], -1).float(),
            }
        if d.recent:
            stored[f"recent_{kind}"] = tensor
        for name, content in stored.items():
            slots = d.recent if name.startswith("recent") else d.window
            ring = torch.zeros(heads, slots, *content.shape[2:], dtype=content.dtype)
            for slot, j in enumerate(ring_positions(length, d.sinks, slots)):
                if j is not None:
                    ring[:, slot] = content[:, j]
            row[name] = ring.numpy()
    return row


def operator_graph(shape: Shape, dtype: type = np.float32) -> gs.Graph:
    """Return a graph of one operator node, every input and output a graph input or output."""
    d = shape.definition
    batch, tokens, heads, kv = "batch", "sequence", shape.query_heads, shape.kv_heads
    sizes = {"key": shape.head_size, "value": shape.value_size}
    inputs = [
        gs.Variable("positions", np.int64, [batch, tokens]),
        *(
            gs.Variable(name, dtype, [batch, heads, tokens, shape.head_size])
            for name in ("query", "query_sink")
        ),
        *(gs.Variable(kind, dtype, [batch, kv, tokens, size]) for kind, size in sizes.items()),
        *(gs.Variable(name, np.int32, [batch]) for name in ("past_length", "new_length")),
        gs.Variable("decay", np.float32, [heads]),
        *(_mean_inputs(shape, dtype) if shape.center else []),
    ]
    tensors = replace(shape.cache, dtype=np.dtype(dtype)).tensors()
    cached = [gs.Variable(name, tensor.dtype, [batch, *tensor.shape]) for name, tensor in tensors.items()]
    output = gs.Variable("output", dtype, [batch, heads, tokens, shape.value_size])
    presents = [gs.Variable(f"present_{t.name}", t.dtype, t.shape) for t in cached]
    numbers = {"sinks": d.sinks, "window": d.window} | ({"recent": d.recent} if d.recent else {})
    heads_and_sizes = {
        "query_heads": heads,
        "kv_heads": kv,
        "head_size": sizes["key"],
        "value_size": sizes["value"],
    }
    attributes = numbers | heads_and_sizes | {"scale": d.scale, "softcap": d.softcap}
    operator = shape.cache.format.operator
    node = gs.Node(
        operator, "attention", attributes, [*inputs, *cached], [output, *presents], domain="rotexport"
    )
    return gs.Graph([node], [*inputs, *cached], [output, *presents], opset=23)


def _mean_inputs(shape: Shape, dtype: type) -> list[gs.Variable]:
    window = shape.definition.window
    return [
        gs.Variable("key_mean", dtype, ["batch", shape.kv_heads, "sequence", shape.head_size]),
        gs.Variable("mean_query", dtype, ["batch", shape.query_heads, "sequence", ANGLES]),
        gs.Variable("mean_angles", dtype, ["batch", f"{window} + sequence", ANGLES]),
    ]


@cache
def session(shape: Shape) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    model = to_proto(operator_graph(shape))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
