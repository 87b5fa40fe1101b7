"""Inputs of MatMuls are quantized, once for all MatMuls that read the same tensor in the same way.

    static      MatMul(DQ(Q(x * [1/s, …], 1), 1), s * W)          s calibrated, per tensor
    per token   Mul(MatMul(DQ(Q(x / s, 1), 1), W), s)             s = clip * max|x| / highest, per row

Scales per token are no mode that runtimes offer; dividing by them first, with Q/DQ of scale one, is exact and
becomes an integer product in ONNX Runtime and TensorRT-RTX. With scales per group of input channels, of the
weight (a float w per group g and output channel) or of the activation, there is one product per group:

    grouped     sum over g of w[g] * s[g] * MatMul(DQ(Q(x[g] / s[g], 1), 1), DQ(codes[g], 1))

as one batched MatMul [G, M, g] x [G, g, N], whose integer sums are exact in float32 while g <= 1,024.
Blocked scales are never left behind quantized activations: TensorRT-RTX 1.7 applies only the first block's.
Zero points of int4 codes are added to them as offsets, on the way to int8; int8 codes keep theirs.

A static scale is a vector of equal numbers in front and goes into the weight's scales behind, for a reason: a
scalar becomes a literal in the kernels TensorRT-RTX generates, and layers cannot share them (SmolLM2-135M:
398 kernels in the plan instead of 284, 8 MB more).

4-bit activations are int8 codes within -7..7, or, asymmetric, within t..t+15 with a t of -15 to 0 for every
row: no zero point is left for the product to take off. Everything between the float activation and the
product's result is float32 (except static fp8, see `narrow_product`), with a Cast on either side in narrower
graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.errors import GraphError
from rotexport.graph.edit import drop_unused, producer
from rotexport.graph.weights import Affine, InMemory, constant, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves
from rotexport.passes.quantize_weights import less_zero_points, narrow_product, requantized
from rotexport.quant.calibrate import InputStatistics
from rotexport.quant.emit import FLOAT, INT64, Emitter, float_type, insert
from rotexport.quant.formats import (
    INT4,
    OFFSET_ACTIVATIONS,
    OFFSET_LEVELS,
    NumberFormat,
    activation_format,
)
from rotexport.quant.lazy import Part, QuantizedPart
from rotexport.quant.plan import SitePlan, WeightForm, planned_nodes

SMALLEST_SCALE: Final = 1e-10  # of a token: a row of zeros stays zero


@dataclass(frozen=True)
class QuantizedInput:
    """A quantized activation: codes as floats, times `scale` per row, or times the number `step`.

    Plain: `codes` [..., K], `scale` [..., 1]. Grouped: `codes` [G, M, g] with the M rows of all leading
    dimensions `leading`; `scale` is [..., 1] again, or [G, M, 1] when `scale_per_group`.
    """

    codes: gs.Variable
    scale: gs.Variable | None
    step: float = 1.0
    leading: gs.Variable | None = None
    scale_per_group: bool = False


class QuantizeActivations(Pass):
    """Quantize the inputs of the planned sites; runs after `QuantizeWeights`.

    `statistics`, by site, are read for static schemes only.
    """

    name = "quantize-activations"
    preserves = Preserves.QUANTIZATION

    def __init__(self, plan: Sequence[SitePlan], statistics: Mapping[str, InputStatistics]) -> None:
        self._plan = [site for site in plan if site.activations.enabled]
        self._statistics = statistics

    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite every planned MatMul.

        Raises:
            GraphError: a planned MatMul or the calibration of a static site is missing, or a grouped site's
                weight has not been quantized.

        """
        nodes = planned_nodes(graph, self._plan)
        self._check(nodes)
        place = {id(node): index for index, node in enumerate(graph.nodes)}
        shared: dict[object, QuantizedInput] = {}
        before: dict[int, list[gs.Node]] = {}
        after: dict[int, list[gs.Node]] = {}
        for site in sorted(self._plan, key=lambda s: place[id(nodes[s.site])]):
            node = nodes[site.site]
            before[id(node)] = []
            key = _quantizer_key(site, node.inputs[0])
            if key not in shared:
                emitter = Emitter(f"{site.site}.input")
                shared[key] = self._quantized(emitter, node.inputs[0], site)
                before[id(node)] += emitter.nodes
            _drop_narrowing(node)
            emitter = Emitter(f"{site.site}.product")
            if site.form is WeightForm.GROUPED:
                weight_nodes, scales = _group_weight(node, shared[key].step)
                before[id(node)] += weight_nodes
                _finish_grouped(emitter, node, shared[key], scales)
            else:
                _scale_weight(node, shared[key].step)
                _finish_plain(emitter, node, shared[key])
            after[id(node)] = emitter.nodes
        insert(graph, before, after)
        drop_unused(graph)
        count = len(self._plan)
        return PassReport(
            count, [f"{len(shared)} quantizers feed {count} MatMuls, all standard nodes"] if count else []
        )

    def _check(self, nodes: Mapping[str, gs.Node]) -> None:
        for site in self._plan:
            if site.activations.mode == "static" and site.site not in self._statistics:
                raise GraphError(f"site {site.site}: static activations were not calibrated")
            weight = nodes[site.site].inputs[1]
            if site.weights.enabled and isinstance(weight, gs.Constant):
                raise GraphError(f"site {site.site}: its weights must be quantized before its activations")

    def _quantized(self, emitter: Emitter, values: gs.Variable, site: SitePlan) -> QuantizedInput:
        number_format = activation_format(site.activations.format, site.activations.symmetric)
        per_group = site.activation_group != site.inputs
        result_type = float_type(values) if narrow_product(site) else FLOAT
        values = emitter.cast("widened", values, FLOAT)
        leading, scale = None, None
        if site.activations.mode == "dynamic" and not per_group:
            values, scale = _normalized(emitter, values, number_format, site.activations.clip)
        if site.form is WeightForm.GROUPED:
            leading = emitter.emit("Shape", "leading", [values], None, INT64, start=0, end=-1)
            values = _grouped(emitter, values, site)
        if per_group:
            values, scale = _normalized(emitter, values, number_format, site.activations.clip)
        if scale is not None and not site.activations.symmetric:
            codes = _rounded(emitter, values, 1.0, number_format, result_type)
            return QuantizedInput(codes, scale, leading=leading, scale_per_group=per_group)
        if scale is not None:
            codes = _codes(emitter, values, 1.0, number_format, result_type)
            return QuantizedInput(codes, scale, leading=leading, scale_per_group=per_group)
        step = self._statistics[site.site].static_scale(site.activations)
        if _weight_carries_step(site):
            width = int(values.shape[-1])
            inverse = emitter.lazy("inverse_step", InMemory(np.full(width, 1 / step, np.float32)))
            values = emitter.emit("Mul", "normalized", [values, inverse], values.shape)
            codes = _codes(emitter, values, 1.0, number_format, result_type)
            return QuantizedInput(codes, None, step, leading)
        codes = _codes(emitter, values, step, number_format, result_type)
        return QuantizedInput(codes, None, leading=leading)


def _quantizer_key(site: SitePlan, values: gs.Variable) -> object:
    product_group = site.product_group if site.form is WeightForm.GROUPED else None
    return id(values), site.activations, site.activation_group, product_group, _weight_carries_step(site)


def _weight_carries_step(site: SitePlan) -> bool:
    return site.weights.enabled and not narrow_product(site)


def _scale_weight(node: gs.Node, step: float) -> None:
    """Multiply the scales of a MatMul's dequantized weight by a static activation scale."""
    dequantize = producer(node.inputs[1])
    if step != 1.0 and dequantize is not None:
        dequantize.inputs[1] = _times(dequantize.inputs[1], step)


def _times(scales: gs.Constant, step: float) -> gs.Constant:
    return scales if step == 1.0 else constant(f"{scales.name}.stepped", Affine(weight_of(scales), step))


def _normalized(
    emitter: Emitter, values: gs.Variable, number_format: NumberFormat, clip: float
) -> tuple[gs.Variable, gs.Variable]:
    """Return rows [..., K] divided by their scales, and the scales [..., 1]; without zero points, clipped."""
    shape = None if values.shape is None else [*values.shape[:-1], 1]
    if number_format == OFFSET_ACTIVATIONS:
        return _offset(emitter, values, shape, clip)
    magnitude = emitter.emit("Abs", "magnitude", [values], values.shape)
    axes = emitter.integers("last", [-1])
    largest = emitter.emit("ReduceMax", "largest", [magnitude, axes], shape, keepdims=1)
    step = emitter.number("step", clip / number_format.highest)
    scale = emitter.emit("Mul", "unguarded_scale", [largest, step], shape)
    scale = emitter.emit("Max", "scale", [scale, emitter.number("smallest", SMALLEST_SCALE)], shape)
    return emitter.emit("Div", "normalized", [values, scale], values.shape), scale


def _offset(
    emitter: Emitter, values: gs.Variable, shape: list[int | str | None] | None, clip: float
) -> tuple[gs.Variable, gs.Variable]:
    """Return rows [..., K] divided by scales whose 16 levels span them, clipped to those; and the scales."""
    axes, zero = emitter.integers("last", [-1]), emitter.number("zero", 0)
    ends = []
    for reduce, beyond, label in (("ReduceMin", "Min", "least"), ("ReduceMax", "Max", "most")):
        end = emitter.emit(reduce, f"{label}_value", [values, axes], shape, keepdims=1)
        ends.append(emitter.emit(beyond, label, [end, zero], shape))
    span = emitter.emit("Sub", "span", ends[::-1], shape)
    step = emitter.number("step", clip / (OFFSET_LEVELS - 1))
    scale = emitter.emit("Mul", "unguarded_scale", [span, step], shape)
    scale = emitter.emit("Max", "scale", [scale, emitter.number("smallest", SMALLEST_SCALE)], shape)
    clipped = emitter.emit("Mul", "clipped_least", [ends[0], emitter.number("clip", clip)], shape)
    lowest = emitter.emit("Round", "lowest", [emitter.emit("Div", "steps", [clipped, scale], shape)], shape)
    highest = emitter.emit("Add", "highest", [lowest, emitter.number("levels", OFFSET_LEVELS - 1)], shape)
    normalized = emitter.emit("Div", "normalized", [values, scale], values.shape)
    raised = emitter.emit("Max", "raised", [normalized, lowest], values.shape)
    return emitter.emit("Min", "lowered", [raised, highest], values.shape), scale


def _grouped(emitter: Emitter, values: gs.Variable, site: SitePlan) -> gs.Variable:
    """Return [..., K] as [G, M, g]."""
    length = site.product_group
    count = site.inputs // length
    shape = emitter.integers("rows_shape", [-1, count, length])
    rows = emitter.emit("Reshape", "rows", [values, shape], [None, count, length])
    return emitter.emit("Transpose", "groups", [rows], [count, None, length], perm=[1, 0, 2])


def _codes(
    emitter: Emitter,
    values: gs.Variable,
    step: float,
    number_format: NumberFormat,
    result_type: np.dtype[Any],
) -> gs.Variable:
    """Return values rounded to multiples of `step`."""
    if number_format.name == "int4":
        lowest = emitter.number("lowest", number_format.lowest * step)
        highest = emitter.number("highest", number_format.highest * step)
        values = emitter.emit("Clip", "clipped", [values, lowest, highest], values.shape)
    return _rounded(emitter, values, step, number_format, result_type)


def _rounded(
    emitter: Emitter,
    values: gs.Variable,
    step: float,
    number_format: NumberFormat,
    result_type: np.dtype[Any],
) -> gs.Variable:
    scale = emitter.number("quantizer_scale", step)
    codes = emitter.quantize("codes", values, scale, number_format)
    return emitter.dequantize("dequantized", codes, scale, result_type)


def _drop_narrowing(node: gs.Node) -> None:
    """Read the weight before the Cast that matched it to a float activation."""
    cast = producer(node.inputs[1])
    if cast is not None and cast.op == "Cast":
        node.inputs[1] = cast.inputs[0]


def _finish_plain(emitter: Emitter, node: gs.Node, quantized: QuantizedInput) -> None:
    output = node.outputs[0]
    node.inputs[0] = quantized.codes
    result = gs.Variable(f"{emitter.stem}.unscaled", float_type(quantized.codes), output.shape)
    node.outputs[0] = result
    if quantized.scale is not None:
        result = emitter.emit("Mul", "scaled", [result, quantized.scale], output.shape)
    emitter.cast("narrowed", result, float_type(output))
    if emitter.nodes:
        emitter.end_with(output)
    else:
        node.outputs[0] = output


def _group_weight(node: gs.Node, step: float) -> tuple[list[gs.Node], gs.Constant]:
    """Make a grouped MatMul read its codes [G, g, N] as integers; return the nodes for it, and the scales."""
    reshape = node.inputs[1].inputs[0]
    dequantize = reshape.inputs[0].inputs[0]
    codes, scales, *zeros = dequantize.inputs
    emitter = Emitter(codes.name)
    if codes.dtype == INT4:  # a batched product of int4 does not build in TensorRT-RTX
        values = emitter.dequantize("values", codes, emitter.number("unit", 1))
        if zeros:
            values = less_zero_points(emitter, values, _offsets(emitter, zeros[0]))
        values = emitter.dequantize("operand", requantized(emitter, values), emitter.number("scale", 1))
    elif zeros:
        units = emitter.lazy("units", InMemory(np.ones(scales.shape, np.float32)))
        values = emitter.dequantize("values", codes, units, zero=zeros[0], **dequantize.attrs)
    else:
        values = emitter.dequantize("values", codes, emitter.number("unit", 1))
    node.inputs[1] = values
    return emitter.nodes, _times(scales, step)


def _offsets(emitter: Emitter, zeros: gs.Constant) -> gs.Constant:
    """Return what is added to codes in place of zero points."""
    part = weight_of(zeros)
    assert isinstance(part, QuantizedPart)
    return emitter.lazy("offsets", replace(part, part=Part.OFFSETS))


def _finish_grouped(emitter: Emitter, node: gs.Node, quantized: QuantizedInput, scales: gs.Constant) -> None:
    """Scale the products [G, M, N], add them up, and restore the leading dimensions."""
    count, outputs = node.inputs[1].shape[0], node.inputs[1].shape[2]
    output = node.outputs[0]
    node.inputs[0] = quantized.codes
    result = gs.Variable(f"{emitter.stem}.integer", FLOAT, [count, None, outputs])
    node.outputs[0] = result
    if quantized.scale_per_group:
        result = emitter.emit("Mul", "row_scaled", [result, quantized.scale], result.shape)
    result = emitter.emit("Mul", "channel_scaled", [result, scales], result.shape)
    axes = emitter.integers("groups", [0])
    result = emitter.emit("ReduceSum", "sum", [result, axes], [None, outputs], keepdims=0)
    sizes = [quantized.leading, emitter.integers("outputs", [outputs])]
    shape = emitter.emit("Concat", "shape", sizes, None, INT64, axis=0)
    result = emitter.emit("Reshape", "restored", [result, shape], output.shape)
    if quantized.scale is not None and not quantized.scale_per_group:
        result = emitter.emit("Mul", "scaled", [result, quantized.scale], output.shape)
    emitter.cast("narrowed", result, float_type(output))
    emitter.end_with(output)
