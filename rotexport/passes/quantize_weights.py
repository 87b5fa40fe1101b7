"""Weights become codes and scales, dequantized in front of their MatMul.

    MatMul(x, W)  ->  MatMul(x, DequantizeLinear(codes, scales))

Which chain stands for W follows from what multiplies it (`WeightForm`); each is one that ONNX Runtime and
TensorRT-RTX both run right, the latter as a low-precision kernel:

    plain       DQ(codes [K, N], scales [N], axis 1), or blocks: scales [K / g, N], axis 0
    two-level   DQ(Q(Clip(DQ(codes [K, N], factors [K / g, N], axis 0)), 1), scales [N], axis 1)
    grouped     Reshape(DQ(codes [K / g, g, N], scales, axis 1), [K, N]); `quantize_activations` turns it
                into one integer product per group

Asymmetric weights give every plain or grouped DQ a third input, their zero points, which TensorRT refuses. In
the two-level form there are none: what they are worth, -zero * factor, is added to the integers

    DQ(Q(Clip(Reshape(Add(DQ(codes [K / g, g, N], factors [K / g, 1, N], axis 1), offsets))), 1), scales [N])

The Clip of the two-level form never acts; TensorRT-RTX 1.7 crashes without it. Where activations are
quantized too, scales stay in float32 whatever the graph's float type: an int8 product scaled in fp16 would
overflow. The Cast that the float activation needs until then goes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.errors import GraphError
from rotexport.graph.weights import Cast, Weight, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves
from rotexport.quant.clipped import ClippedRounding
from rotexport.quant.emit import FLOAT, Emitter, float_type, insert
from rotexport.quant.formats import ACTIVATION_FORMATS, weight_format
from rotexport.quant.lazy import Memo, Part, Quantization, QuantizedPart
from rotexport.quant.plan import SitePlan, WeightForm, planned_nodes
from rotexport.quant.scales import AsymmetricRounding, ScaledRounding, WeightQuantizer


class QuantizeWeights(Pass):
    """Quantize the weights of the planned sites; nothing is read until the graph is written."""

    name = "quantize-weights"
    preserves = Preserves.QUANTIZATION

    def __init__(self, plan: Sequence[SitePlan], solved: Mapping[str, WeightQuantizer] | None = None) -> None:
        """Take the quantizers in `solved`, by site, in place of those that the plan's schemes describe."""
        self._plan = [site for site in plan if site.weights.enabled]
        self._solved = solved or {}

    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite every planned MatMul.

        Raises:
            GraphError: a planned MatMul is missing, or its weight is not a constant matrix.

        """
        nodes = planned_nodes(graph, self._plan)
        for site in self._plan:
            weight = nodes[site.site].inputs[1]
            if not isinstance(weight, gs.Constant) or tuple(weight.shape[:-1]) != (site.inputs,):
                wanted = f"a constant weight [{site.inputs}, N]"
                raise GraphError(f"site {site.site}: node '{site.node}' does not have {wanted}")
        memo = Memo()
        before: dict[int, list[gs.Node]] = {}
        for site in self._plan:
            node = nodes[site.site]
            emitter = Emitter(f"{site.site}.weight")
            quantizer = self._solved.get(site.site) or quantizer_of(site)
            quantization = Quantization(_exact(weight_of(node.inputs[1])), quantizer, memo)
            weight = _Weight(emitter, quantization, site, float_type(node.inputs[0]))
            node.inputs[1] = emitter.cast("narrowed", weight.dequantized(), weight.activation_type)
            before[id(node)] = emitter.nodes
        insert(graph, before, {})
        return PassReport(len(self._plan))


def quantizer_of(site: SitePlan) -> WeightQuantizer:
    """Return the quantizer that rounds a site's weight as its scheme, or what was learned for it, asks."""
    rounding = _rounding(site)
    return rounding if site.clips is None else ClippedRounding(rounding, site.clips, site.site)


def _rounding(site: SitePlan) -> ScaledRounding | AsymmetricRounding:
    scheme, search = site.weights, site.weights.method != "rtn"
    number_format = weight_format(scheme.format, scheme.symmetric)
    two_level = site.form is WeightForm.TWO_LEVEL
    if not scheme.symmetric:
        return AsymmetricRounding(number_format, site.weight_group, search, two_level)
    return ScaledRounding(number_format, site.weight_group, search, two_level)


def _exact(weight: Weight) -> Weight:
    """Return the weight before it was narrowed: codes are rounded once."""
    return weight.weight if isinstance(weight, Cast) else weight


@dataclass(frozen=True)
class _Weight:
    """The nodes that stand for one quantized weight in front of an activation of `activation_type`."""

    emitter: Emitter
    quantization: Quantization
    site: SitePlan
    activation_type: np.dtype[Any]

    def dequantized(self) -> gs.Variable:
        inputs, outputs = self.quantization.source.shape
        groups, group = self.quantization.groups, self.site.weight_group
        if self.site.form is WeightForm.GROUPED:
            return self._grouped(inputs // self.site.product_group, self.site.product_group, outputs)
        if self.site.form is WeightForm.TWO_LEVEL:
            integers = self._integers() if self.site.weights.symmetric else self._shifted()
            scales = self._part(Part.SCALES, outputs)
            return self.emitter.dequantize("dequantized", requantized(self.emitter, integers), scales, axis=1)
        codes = self._part(Part.CODES, inputs, outputs)
        if groups == 1:
            return self._dequantize(codes, (outputs,), axis=1)
        return self._dequantize(codes, (groups, outputs), axis=0, block_size=group)

    def _integers(self) -> gs.Variable:
        """Return codes times factors, [K, N]."""
        inputs, outputs = self.quantization.source.shape
        codes = self._part(Part.CODES, inputs, outputs)
        factors = self._part(Part.FACTORS, self.quantization.groups, outputs)
        group = self.site.weight_group
        return self.emitter.dequantize("products", codes, factors, axis=0, block_size=group)

    def _shifted(self) -> gs.Variable:
        """Return codes less their zero points times factors, [K, N]."""
        outputs = self.quantization.source.shape[1]
        groups, group = self.quantization.groups, self.site.weight_group
        codes = self._part(Part.CODES, groups, group, outputs)
        factors = self._part(Part.FACTORS, groups, 1, outputs)
        products = self.emitter.dequantize("products", codes, factors, axis=1, block_size=group)
        shifted = less_zero_points(self.emitter, products, self._part(Part.OFFSETS, groups, 1, outputs))
        return self._matrix(shifted)

    def _grouped(self, count: int, length: int, outputs: int) -> gs.Variable:
        codes = self._part(Part.CODES, count, length, outputs)
        if self.quantization.groups == 1:
            values = self._dequantize(codes, (outputs,), axis=2)
        else:
            values = self._dequantize(codes, (count, 1, outputs), axis=1, block_size=length)
        return self._matrix(values)

    def _matrix(self, groups: gs.Variable) -> gs.Variable:
        """Return values [G, g, N] as [K, N]."""
        shape = list(self.quantization.source.shape)
        return self.emitter.emit("Reshape", "matrix", [groups, self.emitter.integers("shape", shape)], shape)

    def _dequantize(
        self, codes: gs.Variable | gs.Constant, shape: tuple[int, ...], **attributes: int
    ) -> gs.Variable:
        """Multiply by scales of a shape, less zero points of the same shape where there are any."""
        dtype = self.activation_type if narrow_product(self.site) else None
        scales = self._part(Part.SCALES, *shape)
        zero = None if self.site.weights.symmetric else self._part(Part.ZEROS, *shape)
        return self.emitter.dequantize("dequantized", codes, scales, dtype, zero, **attributes)

    def _part(self, part: Part, *shape: int) -> gs.Constant:
        weight: Weight = QuantizedPart(self.quantization, part, shape)
        if part is Part.SCALES and not self.site.activations.enabled and self.activation_type != FLOAT:
            weight = Cast(weight, self.activation_type)
        return self.emitter.lazy(part.value, weight)


def narrow_product(site: SitePlan) -> bool:
    """Whether quantized operands are multiplied in the graph's own float type, as static fp8 is.

    Its operands carry their scales, so the product cannot overflow; ONNX Runtime refuses it in float32.
    """
    return site.activations.format == "fp8" and site.activations.mode == "static"


def requantized(emitter: Emitter, integers: gs.Variable) -> gs.Variable:
    """Return float integers of at most 127 as int8 codes of scale one."""
    bounds = [emitter.number("lowest", -127), emitter.number("highest", 127)]
    clipped = emitter.emit("Clip", "clipped", [integers, *bounds], integers.shape)
    return emitter.quantize("integers", clipped, emitter.number("one", 1), ACTIVATION_FORMATS["int8"])


def less_zero_points(emitter: Emitter, products: gs.Variable, offsets: gs.Constant) -> gs.Variable:
    """Return integers [G, g, N] with int8 offsets added, which broadcast over the rows of a group."""
    added = emitter.dequantize("offset", offsets, emitter.number("offset_scale", 1))
    return emitter.emit("Add", "shifted", [products, added], products.shape)
