"""The key/value cache is stored in 8 or 4 bits, with a scale and a minimum per token, head and group.

    present = Concat(past, new)      ->   present       = Concat(past, Quantize(new))        int8
    Attention(q, present, …)              present_scale = Concat(past_scale, [scale, minimum])
                                          Attention(q, Dequantize(present, present_scale), …)

What is attended is what is stored: new tokens too are read through quantize-dequantize, so prefill, chunks
and single steps agree. With levels u = round((x - minimum) / scale) of 0 .. 2^b - 1, an int8 element holds
u - 128; 4-bit elements 2i and 2i + 1 of the head axis hold u - 8 in the low and high nibble of byte i, two's
complement. Neither ONNX Runtime's kernels nor TensorRT-RTX know bit operators here, so nibbles are taken
apart with Floor.

The pass sits where the float graph concatenates: after RoPE and any online rotation of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_graphsurgeon as gs

from rotexport.errors import GraphError, RecipeError
from rotexport.graph.edit import consumers, replace_reads
from rotexport.passes.base import Pass, PassReport, Preserves
from rotexport.quant.emit import FLOAT, Emitter, Shape, float_type, insert
from rotexport.quant.formats import ACTIVATION_FORMATS, INT8
from rotexport.quant.scheme import CacheScheme, group_size

BITS: Final = {"int8": 8, "int4": 4}
SMALLEST_SCALE: Final = 2.0**-24  # representable in fp16, too
GROUP_AXIS: Final = 4
INTEGER: Final = ACTIVATION_FORMATS["int8"]


@dataclass(frozen=True)
class CachePort:
    """One cached tensor: its input [batch, heads, past, head size] and the Concat that appends to it."""

    stem: str
    past: gs.Variable
    append: gs.Node
    head_size: int
    bits: int
    group: int
    clip: float

    @property
    def present(self) -> gs.Variable:
        """The graph output that holds old and new tokens."""
        return self.append.outputs[0]

    @property
    def stored_size(self) -> int:
        """Bytes per token and head."""
        return self.head_size * self.bits // 8

    @property
    def grouped(self) -> list[int]:
        """Shape, for Reshape, of [batch, heads, tokens, groups, group]."""
        return [0, 0, 0, self.head_size // self.group, self.group]

    @property
    def middle(self) -> int:
        """What is subtracted from a level so that it fits two's complement."""
        return 1 << (self.bits - 1)


class QuantizeCache(Pass):
    """Quantize keys, values or both, in every layer."""

    name = "quantize-cache"
    preserves = Preserves.QUANTIZATION

    def __init__(self, scheme: CacheScheme) -> None:
        self._scheme = scheme

    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite every cached tensor, its graph input and its graph output.

        Raises:
            GraphError: a cache input is used otherwise than by appending to it.
            RecipeError: the group does not divide the head size, or 4-bit heads have an odd size.

        """
        ports = [port for past in graph.inputs if (port := self._port(graph, past)) is not None]
        before: dict[int, list[gs.Node]] = {}
        after: dict[int, list[gs.Node]] = {}
        for port in ports:
            quantize, dequantize = Emitter(f"{port.stem}_cache.new"), Emitter(f"{port.stem}_cache.all")
            _rewrite(graph, port, quantize, dequantize)
            before[id(port.append)], after[id(port.append)] = quantize.nodes, dequantize.nodes
        insert(graph, before, after)
        return PassReport(len(ports))

    def _port(self, graph: gs.Graph, past: gs.Variable) -> CachePort | None:
        prefix, _, kind = past.name.rpartition(".")
        if not prefix.startswith("past_key_values.") or kind not in ("key", "value"):
            return None
        number_format = self._scheme.key if kind == "key" else self._scheme.value
        if number_format == "none":
            return None
        readers = [node for node in consumers(past) if node.op != "Shape"]
        outputs = {id(tensor) for tensor in graph.outputs}
        if len(readers) != 1 or not _appends(readers[0], past) or id(readers[0].outputs[0]) not in outputs:
            raise GraphError(f"cache input '{past.name}' is not appended to by one Concat that is an output")
        head_size = past.shape[3]
        if not isinstance(head_size, int) or readers[0].inputs[1].shape is None:
            raise GraphError(f"cache input '{past.name}' has no static head size; export it with one")
        bits = BITS[number_format]
        if bits == 4 and head_size % 2:
            raise RecipeError(
                f"kv_cache.{kind}: int4 packs pairs, but heads have {head_size} elements; use int8"
            )
        stem = f"{prefix.removeprefix('past_key_values.')}.{kind}"
        group = group_size(self._scheme.group, head_size, "kv_cache.group", f"a head of '{past.name}'")
        return CachePort(stem, past, readers[0], head_size, bits, group, self._scheme.clip)


def _appends(node: gs.Node, past: gs.Variable) -> bool:
    return (
        node.op == "Concat"
        and len(node.inputs) == 2
        and node.inputs[0] is past
        and node.attrs["axis"] in (2, -2)
    )


def _rewrite(graph: gs.Graph, port: CachePort, quantize: Emitter, dequantize: Emitter) -> None:
    new, past, present = port.append.inputs[1], port.past, port.present
    kept, readers = float_type(past), consumers(present)
    levels, scale, minimum = _levels(quantize, new, port)
    port.append.inputs[1] = _stored(quantize, levels, port)
    pair_shape = [*scale.shape[:4], 2]
    pair = quantize.emit("Concat", "scale_and_minimum", [scale, minimum], pair_shape, kept, axis=GROUP_AXIS)
    past_scale = gs.Variable(f"{past.name}_scale", kept, [*past.shape[:3], *pair_shape[3:]])
    present_scale = gs.Variable(f"{present.name}_scale", kept, [*present.shape[:3], *pair_shape[3:]])
    dequantize.nodes.append(
        gs.Node("Concat", f"{dequantize.stem}.scales", {"axis": 2}, [past_scale, pair], [present_scale])
    )
    for tensor in (past, present):
        tensor.dtype, tensor.shape = INT8, [*tensor.shape[:3], port.stored_size]
    replace_reads(present, _dequantized(dequantize, port, present_scale), readers)
    _insert_after(graph.inputs, past, past_scale)
    _insert_after(graph.outputs, present, present_scale)


def _levels(
    emitter: Emitter, new: gs.Variable, port: CachePort
) -> tuple[gs.Variable, gs.Variable, gs.Variable]:
    """Return levels [batch, heads, tokens, groups, group], not yet rounded, with their scales and minima.

    Scales and minima are in the cache's float type, and the levels are those of the rounded ones.
    """
    kept = float_type(port.past)
    shape = [*new.shape[:3], *port.grouped[3:]]
    one_each = [*shape[:4], 1]
    grouped_shape = emitter.integers("grouped_shape", port.grouped)
    values = emitter.cast("widened", new, FLOAT)
    values = emitter.emit("Reshape", "grouped", [values, grouped_shape], shape)
    last = emitter.integers("last", [-1])
    minimum = emitter.emit("ReduceMin", "lowest", [values, last], one_each, keepdims=1)
    maximum = emitter.emit("ReduceMax", "highest", [values, last], one_each, keepdims=1)
    span = emitter.emit("Sub", "span", [maximum, minimum], one_each)
    if port.clip < 1:
        margin = emitter.emit("Mul", "margin", [span, emitter.number("cut", (1 - port.clip) / 2)], one_each)
        minimum = emitter.emit("Add", "minimum", [minimum, margin], one_each)
    step = emitter.number("step", port.clip / (2**port.bits - 1))
    scale = emitter.emit("Mul", "unguarded_scale", [span, step], one_each)
    scale = emitter.emit("Max", "scale", [scale, emitter.number("smallest", SMALLEST_SCALE)], one_each)
    scale = emitter.cast("narrow_scale", scale, kept)
    minimum = emitter.cast("narrow_minimum", minimum, kept)
    above = emitter.emit("Sub", "above", [values, emitter.cast("base", minimum, FLOAT)], shape)
    levels = emitter.emit("Div", "levels", [above, emitter.cast("divisor", scale, FLOAT)], shape)
    return levels, scale, minimum


def _stored(emitter: Emitter, levels: gs.Variable, port: CachePort) -> gs.Variable:
    """Return levels as int8 [batch, heads, tokens, head size or half of it]."""
    shape = levels.shape
    if port.bits == 8:
        values = emitter.emit("Sub", "centred", [levels, emitter.number("middle", port.middle)], shape)
    else:
        rounded = emitter.emit("Round", "rounded", [levels], shape)
        bounds = [emitter.number("first_level", 0), emitter.number("last_level", 15)]
        values = _packed(emitter, emitter.emit("Clip", "clipped", [rounded, *bounds], shape), port)
    flat = [0, 0, 0, port.stored_size]
    flat_shape = [*shape[:3], port.stored_size]
    values = emitter.emit("Reshape", "flat", [values, emitter.integers("flat_shape", flat)], flat_shape)
    return emitter.quantize("codes", values, emitter.number("one", 1), INTEGER)


def _packed(emitter: Emitter, levels: gs.Variable, port: CachePort) -> gs.Variable:
    """Return 16 (high - 8) + ((low + 8) mod 16) for pairs of levels (low, high)."""
    pair_shape = [0, 0, 0, port.stored_size, 2]
    shape = [*levels.shape[:3], port.stored_size, 1]
    pairs = emitter.emit(
        "Reshape", "pairs", [levels, emitter.integers("pair_shape", pair_shape)], [*shape[:4], 2]
    )
    low, high = _taken(emitter, pairs, ("low", "high"), shape)
    eighths = emitter.emit("Mul", "eighths", [low, emitter.number("eighth", 0.125)], shape)
    wraps = emitter.emit("Floor", "wraps", [eighths], shape)
    carries = emitter.emit("Sub", "carries", [high, wraps], shape)
    sixteens = emitter.emit("Mul", "sixteens", [carries, emitter.number("sixteen", 16)], shape)
    total = emitter.emit("Add", "total", [sixteens, low], shape)
    return emitter.emit("Sub", "packed", [total, emitter.number("offset", 16 * 8 - 8)], shape)


def _taken(emitter: Emitter, pairs: gs.Variable, labels: tuple[str, str], shape: Shape) -> list[gs.Variable]:
    """Return the first and the second of pairs [..., 2], each [..., 1]."""
    kept = float_type(pairs)
    indices = [emitter.integers(f"{label}_index", [index]) for index, label in enumerate(labels)]
    return [
        emitter.emit("Gather", label, [pairs, index], shape, kept, axis=GROUP_AXIS)
        for label, index in zip(labels, indices, strict=True)
    ]


def _dequantized(emitter: Emitter, port: CachePort, scales: gs.Variable) -> gs.Variable:
    """Return what the stored codes stand for, [batch, heads, tokens, head size]."""
    kept = float_type(scales)
    lead = list(port.present.shape[:3])
    shape = [*lead, *port.grouped[3:]]
    codes = emitter.dequantize("bytes", port.present, emitter.number("one", 1, kept))
    if port.bits == 4:
        codes = _unpacked(emitter, codes)
    grouped_shape = emitter.integers("grouped_shape", port.grouped)
    codes = emitter.emit("Reshape", "grouped", [codes, grouped_shape], shape, kept)
    levels = emitter.emit("Add", "levels", [codes, emitter.number("middle", port.middle, kept)], shape, kept)
    scale, minimum = _taken(emitter, scales, ("scale", "minimum"), [*shape[:4], 1])
    scaled = emitter.emit("Mul", "scaled", [levels, scale], shape, kept)
    values = emitter.emit("Add", "values", [scaled, minimum], shape, kept)
    flat_shape = emitter.integers("flat_shape", [0, 0, 0, port.head_size])
    return emitter.emit("Reshape", "flat", [values, flat_shape], [*lead, port.head_size], kept)


def _unpacked(emitter: Emitter, packed: gs.Variable) -> gs.Variable:
    """Return nibbles [..., bytes, 2] of -8 .. 7 from floats that hold bytes of -128 .. 127."""
    shape, kept = packed.shape, float_type(packed)
    sixteenth = emitter.number("sixteenth", 1 / 16, kept)
    shifted = emitter.emit("Add", "shifted", [packed, emitter.number("eight", 8, kept)], shape, kept)
    ratio = emitter.emit("Mul", "shifted_sixteenths", [shifted, sixteenth], shape, kept)
    carries = emitter.emit("Floor", "carries", [ratio], shape, kept)
    sixteens = emitter.emit("Mul", "sixteens", [carries, emitter.number("sixteen", 16, kept)], shape, kept)
    low = emitter.emit("Sub", "low", [packed, sixteens], shape, kept)
    high = emitter.emit(
        "Floor", "high", [emitter.emit("Mul", "sixteenths", [packed, sixteenth], shape, kept)], shape, kept
    )
    axis = emitter.integers("pair_axis", [GROUP_AXIS])
    halves = [
        emitter.emit("Unsqueeze", label, [half, axis], [*shape, 1], kept)
        for label, half in (("low_nibble", low), ("high_nibble", high))
    ]
    return emitter.emit("Concat", "nibbles", halves, [*shape, 2], kept, axis=GROUP_AXIS)


def _insert_after(tensors: list[gs.Variable], old: gs.Variable, new: gs.Variable) -> None:
    index = next(i for i, tensor in enumerate(tensors) if tensor is old)
    tensors.insert(index + 1, new)
