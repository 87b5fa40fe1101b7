"""Operands and integer references for the QuantizedLinear operators, shared by tests of bodies, kernels and plugins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from rotexport.graph.functions import load_function

Array = np.ndarray
FLOAT, HALF, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
EPSILON = {HALF: 2.0**-11, BFLOAT16: 2.0**-8, FLOAT: 2.0**-24}  # half a unit in the last place, relative
RANGE = {8: (-128, 127), 4: (-8, 7)}


def pack_nibbles(values: Array) -> Array:
    """Return int4 values [..., 2 P] as bytes [..., P], the even element in the low nibble."""
    bits = values.astype(np.int8).view(np.uint8) & 15
    return (bits[..., 0::2] | bits[..., 1::2] << 4).view(np.int8)


@dataclass(frozen=True)
class Case:
    """x [rows, inputs] times a weight [outputs, inputs], by `form` ("W4A8") and its variants."""

    form: str
    rows: int
    inputs: int
    outputs: int
    group: int
    two_level: bool = False
    asymmetric: bool = False
    row_groups: bool = False
    ending: str = ""
    out: np.dtype = FLOAT

    def __str__(self) -> str:
        parts = [self.operator.removeprefix("QuantizedLinear"), f"{self.rows}x{self.inputs}x{self.outputs}"]
        return "-".join([*parts, f"g{self.group}", *(["rows"] if self.row_groups else []), str(self.out)])

    @property
    def operator(self) -> str:
        variant = "TwoLevel" * self.two_level + "Asymmetric" * self.asymmetric
        return f"QuantizedLinear{self.form}{variant}{self.ending}"

    @property
    def weight_bits(self) -> int:
        return int(self.form[1])

    @property
    def activation_bits(self) -> int:
        return int(self.form[3])

    @property
    def groups(self) -> int:
        return -(-self.inputs // self.group)

    def operands(self, seed: int = 0, extreme: bool = False) -> Operands:
        """Return random operands; `extreme` ones hold the outermost codes, rows and columns of zeros too."""
        rng = np.random.default_rng([seed, self.rows, self.inputs, self.outputs])
        x = rng.integers(*RANGE[self.activation_bits], (self.rows, self.inputs), endpoint=True)
        weight = rng.integers(*RANGE[self.weight_bits], (self.outputs, self.inputs), endpoint=True)
        if extreme:
            x[0], weight[0] = RANGE[self.activation_bits][0], RANGE[self.weight_bits][0]
            x[-1], weight[-1] = 0, 0
            weight[self.outputs // 2] = RANGE[self.weight_bits][1]
        row_scales = self.groups if self.row_groups else 1
        scale_rows = 1 if self.two_level else self.groups
        return Operands(
            self,
            x,
            weight,
            rng.uniform(0.01, 0.02, (self.rows, row_scales)).astype(np.float32),
            rng.uniform(0.001, 0.002, (scale_rows, self.outputs)).astype(np.float32),
            rng.standard_normal(self.outputs).astype(np.float32),
            self._factors(rng),
            rng.integers(-20, 20, (self.rows, 1)).astype(np.float32),
            rng.standard_normal((self.rows, self.outputs)).astype(self.out),
        )

    def _factors(self, rng: np.random.Generator) -> Array:
        """Return zero points of the whole range, and factors up to the largest that keeps integers in int8."""
        zeros = rng.integers(*RANGE[4], (self.groups, self.outputs), endpoint=True)
        zeros[rng.random(zeros.shape) < 0.2] = 0
        factors = rng.integers(1, 127 // np.maximum(zeros + 8, 7 - zeros), endpoint=True)
        return (factors | zeros << 4).astype(np.int8)


@dataclass(frozen=True)
class Operands:
    """Integers as int64 and the rest as the operators take it; `other` is the residual or the gate."""

    case: Case
    x: Array
    weight: Array
    x_scale: Array
    weight_scale: Array
    bias: Array
    factors: Array
    x_zero: Array
    other: Array

    def padded(self, values: Array) -> Array:
        """Return values [..., K] with zeros up to the last group's end."""
        return np.pad(values, [(0, 0), (0, self.case.groups * self.case.group - self.case.inputs)])

    def padded_weight(self) -> Array:
        """Return codes [N, G g] that stand for zero beyond K."""
        weight = self.padded(self.weight)
        if self.case.two_level:
            weight[:, self.case.inputs :] = (self.factors[-1] >> 4)[:, None]
        return weight

    def group_sums(self) -> Array:
        """Return the integer sums int64 [groups, rows, outputs], in two levels of what codes stand for."""
        count, length = self.case.groups, self.case.group
        x = self.padded(self.x).reshape(-1, count, length)
        weight = self.padded_weight().reshape(-1, count, length)
        if self.case.two_level:
            factors, zeros = (
                part.astype(np.int64).T[:, :, None] for part in (self.factors & 15, self.factors >> 4)
            )
            weight = (weight - zeros) * factors
            assert np.abs(weight).max() <= 127
        return np.einsum("mgk,ngk->gmn", x, weight, dtype=np.int64)

    def weight_sum(self) -> Array:
        """Return what a zero point is multiplied with, float32 [outputs]."""
        sums = self.padded(self.weight).reshape(-1, self.case.groups, self.case.group).sum(axis=2).T
        return (sums * self.weight_scale.astype(np.float64)).sum(axis=0).astype(np.float32)

    def terms(self) -> Array:
        """Return in float64 what is added to make y before its ending [terms, rows, outputs]."""
        sums = self.group_sums().astype(np.float64)
        if self.case.two_level:
            sums = sums.sum(axis=0, keepdims=True)
        row_scale = self.x_scale.astype(np.float64).T[:, :, None]
        scaled = sums * self.weight_scale.astype(np.float64)[:, None, :] * row_scale
        bias = np.broadcast_to(self.bias.astype(np.float64), scaled[:1].shape)
        if not self.case.asymmetric:
            return np.concatenate([scaled, bias])
        shift = self.x_scale.astype(np.float64) * self.x_zero * self.weight_sum()
        return np.concatenate([scaled, bias, -shift[None]])

    def reference(self) -> Array:
        """Return y in float64."""
        y, other = self.terms().sum(axis=0), self.other.astype(np.float64)
        if self.case.ending == "Residual":
            return y + other
        return y * other / (1 + np.exp(-other)) if self.case.ending == "Gated" else y

    def bound(self) -> Array:
        """Return how far float32 arithmetic and one rounding to the output's type may be off.

        Each term is rounded at most four times (conversion, two scales, and half a unit of each partial sum it
        enters, which there are as many of as terms); endings add three roundings of the result, the gate's
        exponential, accurate to a few units, another eight.
        """
        terms = self.terms()
        sums = np.abs(terms).sum(axis=0)
        exact = self.reference()
        other = np.abs(self.other.astype(np.float64))
        error = (4 + len(terms)) * 2.0**-24 * sums
        if self.case.ending == "Gated":
            error = error * other + 12 * 2.0**-24 * np.abs(exact)
        if self.case.ending == "Residual":
            error = error + 2.0**-24 * np.abs(exact)
        smallest = 2.0**-25 if self.case.out == HALF else 0.0
        return (1 + EPSILON[self.case.out]) * error + EPSILON[self.case.out] * np.abs(exact) + smallest

    def inputs(self) -> dict[str, Array]:
        """Return the operator's inputs by name, in order."""
        case = self.case
        x, weight = self.x.astype(np.int8), self.padded_weight().astype(np.int8)
        made: dict[str, Array] = {"x": pack_nibbles(x) if case.activation_bits == 4 else x}
        made["x_scale"] = self.x_scale
        if case.asymmetric:
            made["x_zero"] = self.x_zero
        made["weight"] = pack_nibbles(weight) if case.weight_bits == 4 else weight
        if case.two_level:
            made["factors"] = self.factors
        made["weight_scale"] = self.weight_scale
        if case.asymmetric:
            made["weight_sum"] = self.weight_sum()
        made["bias"] = self.bias
        if case.ending:
            made["residual" if case.ending == "Residual" else "gate"] = self.other
        return made


def attributes(case: Case) -> dict[str, int]:
    """Return the operator's attributes."""
    return {"group": case.group, "out_type": onnx.helper.np_dtype_to_tensor_dtype(case.out)}


def with_bodies(*names: str) -> list[onnx.FunctionProto]:
    """Return the bodies of operators, behind those that they call."""
    bodies: dict[str, onnx.FunctionProto] = {}
    for name in names:
        body = load_function(name)
        for inner in with_bodies(*(node.op_type for node in body.node if node.domain == "rotexport")):
            bodies.setdefault(inner.name, inner)
        bodies.setdefault(name, body)
    return list(bodies.values())


def model_of(case: Case, operands: Operands, dynamic: bool = False) -> onnx.ModelProto:
    """Return a model of one node with its body: weights are initializers, the rest inputs."""
    made = operands.inputs()
    fed = ("x", "x_scale", "x_zero", "residual", "gate")
    kind = onnx.helper.np_dtype_to_tensor_dtype

    def value(name: str, array: Array) -> onnx.ValueInfoProto:
        shape: list[Any] = ["rows" if dynamic else array.shape[0], *array.shape[1:]]
        return onnx.helper.make_tensor_value_info(name, kind(array.dtype), shape)

    node = onnx.helper.make_node(
        case.operator,
        list(made),
        ["y"],
        name="linear",
        domain="rotexport",
        plugin_namespace="rotexport",
        plugin_version="1",
        **attributes(case),
    )
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [value(name, array) for name, array in made.items() if name in fed],
        [value("y", operands.other)],
        [onnx.numpy_helper.from_array(array, name) for name, array in made.items() if name not in fed],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("rotexport", 1)]
    return onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=11, functions=with_bodies(case.operator)
    )


def feeds(model: onnx.ModelProto, operands: Operands) -> dict[str, Array]:
    """Return what a model of `model_of` is fed."""
    made = operands.inputs()
    return {value.name: made[value.name] for value in model.graph.input}


def variants(base: Case) -> list[Case]:
    """Return every operator of a form, at the sizes of `base`."""
    cases = [base, *(replace(base, ending=ending) for ending in ("Residual", "Gated"))]
    cases.append(replace(base, asymmetric=True))
    if base.weight_bits == 4:
        cases += [replace(base, two_level=True, ending=ending) for ending in ("", "Residual", "Gated")]
    return cases
