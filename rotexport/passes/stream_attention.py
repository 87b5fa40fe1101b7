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

from rotexport.errors import GraphError
from rotexport.graph.basis import attention_nodes
from rotexport.graph.edit import consumers, producer, replace_reads
from rotexport.graph.masks import mask_window
from rotexport.graph.weights import Array, InMemory, constant
from rotexport.passes.base import Pass, PassReport, Preserves, rounding
from rotexport.passes.stream_interface import StreamInterface, choose_logits
from rotexport.quant.emit import Emitter
from rotexport.streaming.cache import FLOAT_CACHE, CacheFormat, LayerCache
from rotexport.streaming.centering import key_path
from rotexport.streaming.eviction import RING
from rotexport.streaming.scheme import AttentionScheme


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
        """Take what to do, and if keys are centered every layer's mean [Hk, D] before rotary embedding.

        Raises:
            RecipeError: the cache format and the eviction policy do not go together, or the policy has no
                context.

        """
        self.scheme = scheme
        self.cache_format = cache_format
        self.key_means = key_means or {}
        scheme.eviction.require_context()
        scheme.check_format(cache_format)
        if scheme.decay:
            self.preserves = Preserves.CHANGED
        elif cache_format.bits is not None:
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
        if self.preserves is Preserves.ROUNDING:
            self.preserves = rounding(graph)
        stream = StreamInterface(graph)
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
            fresh = [stream.absolute, layer.query, query_sink, layer.key, layer.value, *stream.lengths, decay]
            if cache.format.center:
                fresh += self._center(graph, stream, layer, cache)
            self._swap(graph, layer, cache, fresh, ports)
        choose_logits(graph)
        stream.close()
        report.notes = _describe(caches)
        return report

    def _cache(self, layer: _Layer, own_window: int | None) -> LayerCache:
        ours = (self.scheme.sinks, self.scheme.window)
        sinks, window = ours if own_window is None else (0, own_window)
        _, kv_heads, _, head_size = layer.key.shape
        sizes = (kv_heads, head_size, layer.value.shape[3])
        eviction = self.scheme.eviction if own_window is None else RING
        return LayerCache(*sizes, sinks, window, self.cache_format, np.dtype(layer.key.dtype), eviction)

    def _center(
        self, graph: gs.Graph, stream: StreamInterface, layer: _Layer, cache: LayerCache
    ) -> list[gs.Variable]:
        """Return the mean of each new token, queries times the mean, and the angles of all tokens."""
        if layer.number not in self.key_means:
            raise GraphError(f"kv_cache.center: layer {layer.number} has no calibrated mean of its keys")
        path = key_path(stream.flow, layer.key)
        mean = self.key_means[layer.number].reshape(cache.kv_heads, cache.head_size)
        table, has_constant = path.mean_map(mean)
        ring = (cache.sinks, cache.window)
        now, everything = stream.angles(path.angles, has_constant, ring, cache.dtype)
        emitter = Emitter(f"attention.{layer.number}.mean")
        by_angle = emitter.lazy("table", InMemory(table.astype(cache.dtype)))
        by_channel = emitter.lazy("turned", InMemory(table.transpose(0, 2, 1).astype(cache.dtype)))
        axis = emitter.integers("heads", [1])
        shape, dtype, angles = layer.query.shape, cache.dtype, table.shape[2]
        shared = emitter.emit("Unsqueeze", "angles", [now, axis], ["batch", 1, *now.shape[1:]], dtype)
        key_mean = emitter.emit("MatMul", "key", [shared, by_channel], layer.key.shape, dtype)
        stacked = emitter.integers("stacked", [0, cache.kv_heads, -1, cache.head_size])
        apart = emitter.integers("apart", [0, shape[1], -1, angles])
        rows = emitter.emit("Reshape", "rows", [layer.query, stacked], None, dtype)
        products = emitter.emit("MatMul", "products", [rows, by_angle], None, dtype)
        mean_query = emitter.emit("Reshape", "query", [products, apart], [*shape[:3], angles], dtype)
        place = graph.nodes.index(layer.node)
        graph.nodes[place:place] = emitter.nodes
        return [key_mean, mean_query, everything]

    def _decay(self, heads: int, slides: bool, known: dict[tuple[int, bool], gs.Constant]) -> gs.Constant:
        """Return slopes [Hq], one constant for layers alike; layers that slide in the model do not decay."""
        if (heads, slides) not in known:
            slope = [0.0] * heads if slides else self.scheme.slopes(heads)
            slopes = InMemory(np.array(slope, np.float32))
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
            **(cache.eviction.attributes if cache.eviction.enabled else {}),
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
            cache.operator,
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


def _describe(caches: list[LayerCache]) -> list[str]:
    kinds: dict[tuple[int, int], int] = {}
    for cache in caches:
        kinds[cache.sinks, cache.window] = kinds.get((cache.sinks, cache.window), 0) + 1
    lines = [f"{count} layers: {sinks} sinks, window {window}" for (sinks, window), count in kinds.items()]
    total = sum(cache.nbytes for cache in caches)
    return [*lines, f"cache: {total} bytes per row, however long the stream"]
