"""Products of dynamically quantized activations become QuantizedLinear operators.

    MatMul(x, weight)  ->  QuantizedLinear...(codes, scale, packed weight, scales, bias)

`codes` and `scale` come from one FastHadamardInt8 or Int4 for all products that read x in the same way; a
FastHadamard in front, which only they read, becomes part of it, and otherwise its transform is that of length
one. Scales per group of activations are those of x in rows of a group. What follows a product goes into it
where nothing else reads the product: a bias, then the addition to the residual stream or the product with
silu(gate).

Runs after `QuantizeWeights`, whose codes and scales it packs, and before `QuantizeActivations`, which is left
the other sites. TensorRT runs these operators as kernels; what they compute is the same as without them but
for rounding, and for codes of -8 of clipped 4-bit activations, of which it otherwise uses -7 at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rotexport.errors import GraphError
from rotexport.graph.edit import consumers, drop_unused, producer
from rotexport.graph.functions import DOMAIN
from rotexport.graph.weights import Cast, InMemory, Weight, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves
from rotexport.passes.linear_endings import Ending, absorb_bias, find_ending
from rotexport.quant.emit import FLOAT, Emitter, float_type, insert
from rotexport.quant.lazy import Part, Quantization, QuantizedPart
from rotexport.quant.operators import LinearOperator, linear_operator
from rotexport.quant.packing import INT8, PackedRows
from rotexport.quant.plan import SitePlan, planned_nodes
from rotexport.transforms.online import PLUGIN

ONE: Final = np.ones((1, 1), np.int8)


class PlaceLinears(Pass):
    """Place the operators at the sites that the plan has them for (`quant.operators.with_operators`)."""

    name = "place-linears"
    preserves = Preserves.QUANTIZATION

    def __init__(self, plan: Sequence[SitePlan]) -> None:
        self._plan = [site for site in plan if site.operator]
        self._left = [site for site in plan if site.activations.enabled and not site.operator]

    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite every planned MatMul.

        Raises:
            GraphError: a planned MatMul is missing, its input has no known shape, or its weight has not been
                quantized.

        """
        nodes = planned_nodes(graph, self._plan)
        weights = {site.site: _quantization(site, nodes[site.site]) for site in self._plan}
        for site in self._plan:
            if nodes[site.site].inputs[0].shape is None:
                raise GraphError(f"site {site.site}: '{nodes[site.site].inputs[0].name}' has no known shape")
        place = {id(node): index for index, node in enumerate(graph.nodes)}
        inputs = _Inputs([(site, nodes[site.site].inputs[0]) for site in self._plan])
        before: dict[int, list[gs.Node]] = {}
        placed: Counter[str] = Counter()
        for site in sorted(self._plan, key=lambda s: place[id(nodes[s.site])]):
            operator = _operator_of(site)
            node = nodes[site.site]
            emitter = Emitter(f"{site.site}.input")
            codes, scale = inputs.quantized(emitter, site, operator, node.inputs[0])
            before[id(node)] = emitter.nodes
            bias = absorb_bias(graph, node)
            ending = find_ending(graph, node)
            _replace(
                node, operator, [codes, scale, *_constants(site, operator, weights[site.site], bias)], ending
            )
            placed[node.op] += 1
        insert(graph, before, {})
        drop_unused(graph)
        notes = [f"{count} products are {name}" for name, count in sorted(placed.items())]
        left = Counter(str(linear_operator(site)) for site in self._left)
        notes += [f"{count} stay standard nodes: {reason}" for reason, count in left.items()]
        return PassReport(len(self._plan), notes)


def _operator_of(site: SitePlan) -> LinearOperator:
    operator = linear_operator(site)
    if isinstance(operator, str):
        raise GraphError(f"site {site.site} is planned as an operator, but {operator}")
    return operator


def _quantization(site: SitePlan, node: gs.Node) -> Quantization:
    """Return how the weight of a MatMul was quantized, from the codes it is dequantized from."""
    tensor = node.inputs[1]
    while isinstance(tensor, gs.Variable):
        writer = producer(tensor)
        if writer is None:
            break
        tensor = writer.inputs[0]
    codes = weight_of(tensor) if isinstance(tensor, gs.Constant) else None
    if not isinstance(codes, QuantizedPart):
        raise GraphError(f"site {site.site}: its weights must be quantized before its operator is placed")
    return codes.quantization


def _constants(
    site: SitePlan, operator: LinearOperator, weight: Quantization, bias: gs.Constant | None
) -> list[gs.Constant]:
    """Return weight, factors where there are some, scales and bias."""
    outputs = weight.source.shape[1]
    emitter = Emitter(f"{site.site}.weight")
    made = [emitter.lazy("packed", PackedRows(weight, operator.weight_bits, operator.length))]
    if operator.two_level:
        factors = QuantizedPart(weight, Part.FACTOR_BYTES, (operator.groups, outputs))
        made.append(emitter.lazy("factors", factors))
    groups = 1 if operator.two_level else operator.groups
    made.append(emitter.lazy("scales", QuantizedPart(weight, Part.SCALES, (groups, outputs))))
    made.append(emitter.lazy("bias", _exact_bias(bias, outputs)))
    return made


def _exact_bias(bias: gs.Constant | None, outputs: int) -> Weight:
    """Return a bias before it was narrowed to the graph's float type; zeros where there is none."""
    if bias is None:
        return InMemory(np.zeros(outputs, np.float32))
    weight = weight_of(bias)
    return Cast(weight.weight if isinstance(weight, Cast) else weight, FLOAT)


def _replace(
    node: gs.Node, operator: LinearOperator, inputs: Sequence[gs.Variable | gs.Constant], ending: Ending
) -> None:
    """Turn a MatMul into the operator, under the same name."""
    output = node.outputs[0] if ending.output is None else ending.output
    out_type = onnx.helper.np_dtype_to_tensor_dtype(float_type(output))
    node.op, node.domain = f"{operator.name}{ending.name}", DOMAIN
    node.attrs = {**PLUGIN, "group": operator.group, "out_type": out_type}
    node.inputs = [*inputs, *ending.operands]
    node.outputs = [output]


class _Inputs:
    """Quantizes each input once for all products that read it in the same way."""

    def __init__(self, sites: Sequence[tuple[SitePlan, gs.Variable]]) -> None:
        self._readers = Counter(id(values) for site, values in sites if site.activation_group == site.inputs)
        self._made: dict[object, tuple[gs.Variable, gs.Variable]] = {}

    def quantized(
        self, emitter: Emitter, site: SitePlan, operator: LinearOperator, values: gs.Variable
    ) -> tuple[gs.Variable, gs.Variable]:
        """Return codes and scales, made by nodes added to `emitter` unless they are there already."""
        row = site.activation_group
        key = (id(values), operator.activation_bits, row, site.activations.clip)
        if key not in self._made:
            whole = row == site.inputs
            fused = (
                producer(values) if whole and self._readers[id(values)] == len(consumers(values)) else None
            )
            if fused is not None and fused.op == "FastHadamard":
                operands = list(fused.inputs)
            else:
                rows = values if whole else _in_groups(emitter, values, row)
                signs = InMemory(np.ones(row, float_type(values)))
                tables = [emitter.lazy(name, InMemory(ONE)) for name in ("base", "hi", "lo")]
                operands = [rows, emitter.lazy("signs", signs), *tables]
            codes, scale = _quantizer(emitter, operator, operands, site.activations.clip)
            if not whole:
                width = site.inputs * operator.activation_bits // 8
                codes = _out_of_groups(emitter, "codes", codes, values, width)
                scale = _out_of_groups(emitter, "scale", scale, values, operator.groups)
            self._made[key] = codes, scale
        return self._made[key]


def _quantizer(
    emitter: Emitter, operator: LinearOperator, operands: list[gs.Variable | gs.Constant], clip: float
) -> tuple[gs.Variable, gs.Variable]:
    leading = operands[0].shape[:-1]
    width = int(operands[0].shape[-1]) * operator.activation_bits // 8
    codes = gs.Variable(f"{emitter.stem}.quantized", INT8, [*leading, width])
    scale = gs.Variable(f"{emitter.stem}.scales", FLOAT, [*leading, 1])
    name = f"FastHadamardInt{operator.activation_bits}"
    attributes = {**PLUGIN, "clip": float(clip)}
    emitter.nodes.append(
        gs.Node(name, f"{emitter.stem}.quantizer", attributes, operands, [codes, scale], domain=DOMAIN)
    )
    return codes, scale


def _in_groups(emitter: Emitter, values: gs.Variable, group: int) -> gs.Variable:
    """Return [..., K] as [..., K / group, group]."""
    count = int(values.shape[-1]) // group
    leading = [0] * (len(values.shape) - 1)
    shape = emitter.integers("group_shape", [*leading, count, group])
    sizes = [*values.shape[:-1], count, group]
    return emitter.emit("Reshape", "groups", [values, shape], sizes, float_type(values))


def _out_of_groups(
    emitter: Emitter, label: str, grouped: gs.Variable, like: gs.Variable, width: int
) -> gs.Variable:
    """Return [..., groups, n] as [..., width]."""
    shape = emitter.integers(f"{label}_shape", [*[0] * (len(like.shape) - 1), width])
    return emitter.emit(
        "Reshape", label, [grouped, shape], [*like.shape[:-1], width], np.dtype(grouped.dtype)
    )
