"""Swaps attention over a growing cache for the sink/window operator over a bounded one.

    present = Concat(past, new)          ->    o, present… = SinkWindowAttention(positions, q, q', k, v,
    o = Attention(q, present_key, …)                         past_length, new_length, decay, cache…)

Layers that see everything get sinks and a window: the same function while a stream is shorter than the
window, StreamingLLM's beyond. Layers that slide in the model keep their own window, without sinks: the
same function.

The query is rotated twice: to its absolute position for window keys (q), to its position inside the cache for
sinks (q'). q' is made by copying what lies between the positions and q, with the positions replaced; whatever
stands there (rotary embedding, casts, an online Hadamard) is copied with it. Positions are computed from
`past_length`, so `attention_mask` and `position_ids` disappear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.errors import GraphError, UnsupportedModelError
from rotexport.graph.basis import attention_nodes
from rotexport.graph.edit import consumers, drop_unused, producer, replace_reads, sort
from rotexport.graph.masks import mask_window
from rotexport.graph.weights import Array, InMemory, constant
from rotexport.passes.base import Pass, PassReport, Preserves, rounding
from rotexport.quant.emit import INT64, Emitter
from rotexport.streaming.cache import FLOAT_CACHE, CacheFormat, LayerCache
from rotexport.streaming.scheme import AttentionScheme

INT32 = np.dtype(np.int32)
MIXERS = ("Attention", "SinkWindowAttention")


class StreamAttention(Pass):
    """Give every attention layer a bounded cache in `cache_format`."""

    name = "stream-attention"
    preserves = Preserves.ROUNDING

    def __init__(
        self,
        scheme: AttentionScheme,
        cache_format: CacheFormat = FLOAT_CACHE,
        key_means: Mapping[int, Array] | None = None,
    ) -> None:
        """Take what to do, and the calibrated mean key [Hk, D] of every layer if keys are centered."""
        self.scheme = scheme
        self.cache_format = cache_format
        self.key_means = key_means or {}
        if cache_format.bits is not None:
            self.preserves = Preserves.QUANTIZATION

    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite every layer and the graph's interface.

        Raises:
            GraphError: a layer does not append to a cache of its own.
            UnsupportedModelError: a mask or the model's positions have no streaming meaning.
            RecipeError: the cache format does not fit the heads.

        """
        layers = [_read(graph, number, node) for number, node in attention_nodes(graph)]
        windows = {id(layer.mask): mask_window(graph, layer.mask) for layer in layers}
        caches = [self._cache(layer, windows[id(layer.mask)]) for layer in layers]
        cached_tensors = [cache.tensors() for cache in caches]  # refuses before anything changes
        if self.cache_format.bits is None:
            self.preserves = rounding(graph)
        stream = _Stream(graph)
        slopes: dict[tuple[int, bool], gs.Constant] = {}
        report = PassReport(len(layers))
        for layer, cache, tensors in zip(layers, caches, cached_tensors, strict=True):
            slides = windows[id(layer.mask)] is not None
            decay = self._decay(layer.query.shape[1], slides, slopes)
            limit = cache.sinks + cache.window - 1
            query_sink = stream.query_at(layer.query, limit) if cache.sinks else layer.query
            ports = {
                name: gs.Variable(f"cache.{layer.number}.{name}", tensor.dtype, ["batch", *tensor.shape])
                for name, tensor in tensors.items()
            }
            lengths = [graph.tensors()[name] for name in ("past_length", "new_length")]
            fresh = [stream.positions, layer.query, query_sink, layer.key, layer.value, *lengths, decay]
            if cache.recent:
                fresh.append(
                    constant(f"attention.{layer.number}.key_mean", InMemory(self._mean(layer, cache)))
                )
            self._swap(graph, layer, cache, fresh, ports)
        choose_logits(graph)
        stream.close()
        report.notes = _describe(caches)
        return report

    def _cache(self, layer: _Layer, own_window: int | None) -> LayerCache:
        sinks, window = (self.scheme.sinks, self.scheme.window) if own_window is None else (0, own_window)
        _, kv_heads, _, head_size = layer.key.shape
        value_size = layer.value.shape[3]
        return LayerCache(
            kv_heads, head_size, value_size, sinks, window, self.cache_format, np.dtype(layer.key.dtype)
        )

    def _mean(self, layer: _Layer, cache: LayerCache) -> Array:
        shape = (cache.kv_heads, cache.head_size)
        if not self.cache_format.center:
            return np.zeros(shape, cache.dtype)
        if layer.number not in self.key_means:
            raise GraphError(f"kv_cache.center: layer {layer.number} has no calibrated mean of its keys")
        return self.key_means[layer.number].reshape(shape).astype(cache.dtype)

    def _decay(self, heads: int, slides: bool, known: dict[tuple[int, bool], gs.Constant]) -> gs.Constant:
        """Return slopes [Hq], one constant for layers alike; layers that slide in the model do not decay."""
        if (heads, slides) not in known:
            slope = 0.0 if slides else self.scheme.decay
            slopes = InMemory(np.full(heads, slope, np.float32))
            known[heads, slides] = constant(f"attention.decay.{len(known)}", slopes)
        return known[heads, slides]

    def _swap(
        self,
        graph: gs.Graph,
        layer: _Layer,
        cache: LayerCache,
        fresh: list[gs.Variable],
        ports: dict[str, gs.Variable],
    ) -> None:
        presents = [
            gs.Variable(f"present.{layer.number}.{name}", port.dtype, port.shape)
            for name, port in ports.items()
        ]
        attributes = {
            "sinks": cache.sinks,
            "window": cache.window,
            **({"recent": cache.recent} if cache.recent else {}),
            "query_heads": layer.query.shape[1],
            "kv_heads": cache.kv_heads,
            "head_size": cache.head_size,
            "value_size": cache.value_size,
            "scale": float(layer.node.attrs["scale"]),
            "softcap": float(layer.node.attrs.get("softcap", 0.0)),
            "plugin_namespace": "rotexport",
            "plugin_version": "1",
        }
        output = layer.node.outputs[0]
        mixed = gs.Variable(f"{output.name}.streamed", output.dtype, output.shape)
        node = gs.Node(
            cache.format.operator,
            f"attention.{layer.number}",
            attributes,
            [*fresh, *ports.values()],
            [mixed, *presents],
            domain="rotexport",
        )
        graph.nodes.insert(graph.nodes.index(layer.node), node)
        replace_reads(output, mixed, consumers(output))
        graph.inputs += ports.values()
        graph.outputs = [
            *(t for t in graph.outputs if t not in (layer.all_keys, layer.all_values)),
            *presents,
        ]


@dataclass(frozen=True)
class _Layer:
    """One attention and what it reads: query [B, Hq, S, D], the new key and value [B, Hk, S, ·], a mask."""

    number: int
    node: gs.Node
    query: gs.Variable
    key: gs.Variable
    value: gs.Variable
    all_keys: gs.Variable
    all_values: gs.Variable
    mask: gs.Variable


def _read(graph: gs.Graph, number: int, node: gs.Node) -> _Layer:
    query, all_keys, all_values, mask = node.inputs
    new = []
    for kind, tensor in (("key", all_keys), ("value", all_values)):
        append = producer(tensor)
        past = f"past_key_values.{number}.{kind}"
        if append is None or append.op != "Concat" or append.inputs[0].name != past:
            raise GraphError(f"attention {number} does not append to '{past}': its cache is not its own")
        new.append(append.inputs[1])
    for tensor in (query, *new):
        if not isinstance(tensor.shape[1], int) or not isinstance(tensor.shape[3], int):
            raise GraphError(
                f"'{tensor.name}' has no static number of heads and head size; export it with them"
            )
    return _Layer(number, node, query, new[0], new[1], all_keys, all_values, mask)


class _Stream:
    """The new interface: lengths in, positions computed, queries at positions inside the cache."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._copies: dict[int, dict[int, gs.Variable]] = {}  # by limit, by tensor
        self._moves: dict[int, bool] = {}
        inputs = {tensor.name: tensor for tensor in graph.inputs}
        self._old = inputs["position_ids"]
        if self._depends(graph.tensors()["block.0.input"]):
            raise UnsupportedModelError(
                "the model adds learned positions to its embeddings: a stream would run past their table; "
                "use attention.kind: dense"
            )
        past, new = (gs.Variable(name, INT32, ["batch"]) for name in ("past_length", "new_length"))
        graph.inputs[1:1] = [past, new]
        emitter = Emitter("positions")
        axes, zero, one = (
            emitter.integers("axis", [1]),
            emitter.number("zero", 0, INT64),
            emitter.number("one", 1, INT64),
        )
        length = emitter.emit("Shape", "length", [inputs["input_ids"]], [1], INT64, start=1, end=2)
        count = emitter.emit("Squeeze", "count", [length], [], INT64)
        steps = emitter.emit("Range", "steps", [zero, count, one], ["sequence"], INT64)
        past_row = emitter.cast("past", past, INT64)
        column = emitter.emit("Unsqueeze", "column", [past_row, axes], ["batch", 1], INT64)
        self.positions = emitter.emit("Add", "absolute", [column, steps], ["batch", "sequence"], INT64)
        graph.nodes[0:0] = emitter.nodes

    def query_at(self, query: gs.Variable, limit: int) -> gs.Variable:
        """Return the query as computed with every position replaced by min(position, limit)."""
        if not self._depends(query):
            return query
        if limit not in self._copies:
            emitter = Emitter(f"positions.within_{limit}")
            last = emitter.number("limit", limit, INT64)
            clipped = emitter.emit("Min", "clipped", [self.positions, last], self.positions.shape, INT64)
            place = self._graph.nodes.index(producer(self.positions))
            self._graph.nodes[place + 1 : place + 1] = emitter.nodes
            self._copies[limit] = {id(self._old): clipped}
        return self._copy(query, self._copies[limit], f".within_{limit}")

    def close(self) -> None:
        """Read positions from the lengths; drop the old inputs and what only they fed."""
        replace_reads(self._old, self.positions, consumers(self._old))
        drop_unused(self._graph)
        for tensor in list(self._graph.inputs):
            if tensor.name in ("attention_mask", "position_ids") or tensor.name.startswith(
                "past_key_values."
            ):
                self._graph.inputs.remove(tensor)
        sort(self._graph)

    def _depends(self, tensor: gs.Variable | gs.Constant) -> bool:
        """Tell whether positions reach a tensor otherwise than through an earlier layer's attention."""
        if id(tensor) not in self._moves:
            writer = producer(tensor)
            if writer is None or writer.op.startswith(MIXERS):
                self._moves[id(tensor)] = tensor is self._old
            else:
                self._moves[id(tensor)] = any(self._depends(source) for source in writer.inputs)
        return self._moves[id(tensor)]

    def _copy(self, tensor: gs.Variable, copies: dict[int, gs.Variable], suffix: str) -> gs.Variable:
        if not self._depends(tensor):
            return tensor
        if id(tensor) not in copies:
            node: gs.Node = producer(tensor)
            inputs = [self._copy(source, copies, suffix) for source in node.inputs]
            outputs = [gs.Variable(f"{t.name}{suffix}", t.dtype, t.shape) for t in node.outputs]
            twin = gs.Node(
                node.op, f"{node.name}{suffix}", dict(node.attrs), inputs, outputs, domain=node.domain
            )
            self._graph.nodes.insert(self._graph.nodes.index(node) + 1, twin)
            copies.update((id(old), new) for old, new in zip(node.outputs, outputs, strict=True))
        return copies[id(tensor)]


def choose_logits(graph: gs.Graph) -> None:
    """Compute logits only at the positions `logit_index` [batch, logit_count] of the call.

    The last block's output is gathered before the final norm and head: all logits of a long prompt would be
    gigabytes.
    """
    numbers = [int(name.split(".")[1]) for name in graph.tensors() if _is_block_output(name)]
    stream = graph.tensors()[f"block.{max(numbers)}.output"]
    index = gs.Variable("logit_index", INT64, ["batch", "logit_count"])
    graph.inputs.insert(1, index)
    emitter = Emitter("logits")
    last = emitter.integers("last", [-1])
    places = emitter.emit("Unsqueeze", "places", [index, last], ["batch", "logit_count", 1], INT64)
    readers = consumers(stream)
    shape = ["batch", "logit_count", stream.shape[2]]
    chosen = emitter.emit("GatherND", "chosen", [stream, places], shape, np.dtype(stream.dtype), batch_dims=1)
    place = graph.nodes.index(producer(stream)) + 1
    graph.nodes[place:place] = emitter.nodes
    replace_reads(stream, chosen, readers)
    for tensor in _downstream(chosen):
        if tensor.shape is not None:
            tensor.shape = ["logit_count" if dim == "sequence" else dim for dim in tensor.shape]


def _is_block_output(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[0] == "block" and parts[1].isdigit() and parts[2] == "output"


def _downstream(tensor: gs.Variable) -> list[gs.Variable]:
    found, todo = [], [tensor]
    while todo:
        for node in consumers(todo.pop()):
            found += node.outputs
            todo += node.outputs
    return found


def _describe(caches: list[LayerCache]) -> list[str]:
    kinds: dict[tuple[int, int], int] = {}
    for cache in caches:
        kinds[cache.sinks, cache.window] = kinds.get((cache.sinks, cache.window), 0) + 1
    lines = [f"{count} layers: {sinks} sinks, window {window}" for (sinks, window), count in kinds.items()]
    total = sum(cache.nbytes for cache in caches)
    return [*lines, f"cache: {total} bytes per row, however long the stream"]
