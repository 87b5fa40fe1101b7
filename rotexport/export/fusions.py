"""Rewrites of traced operator chains into the fused operators of ONNX opset 23."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import MatchResult, OrValue, RewriteRuleClassBase, RewriteRuleSet

_MAX_DEPTH = 16  # pointwise operators between a doubled angle and the rotation that uses it


def fuse(model: ir.Model) -> None:
    """Fuse RMS norms, tanh GELUs and rotary embeddings, in place.

    Cosines and sines stay shared: a doubled angle `Concat(f, f)` sinks through the pointwise operators that
    follow it until the rotation takes the undoubled half.
    """
    RewriteRuleSet([RmsNorm.rule(), TanhGelu.rule()], commute=True).apply_to_model(model)
    sinking = RewriteRuleSet(
        [*(DoubledUnary.rule(op) for op in ("Cos", "Sin")), DoubledScale.rule()], commute=True
    )
    for _ in range(_MAX_DEPTH):
        if sinking.apply_to_model(model) == 0:
            break
    RewriteRuleSet([Rotary.rule()], commute=True).apply_to_model(model)
    RewriteRuleSet([PartialRotary.rule()]).apply_to_model(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


class RmsNorm(RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript ships no types
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis is `RMSNormalization`."""

    def pattern(self, op: Any, x: Any, scale: Any, axes: Any, epsilon: Any) -> Any:
        """Match the chain; `scale` may be an expression (1 + gamma)."""
        square = OrValue([op.Pow(x, 2.0), op.Mul(x, x)])
        mean = op.ReduceMean(square, axes, keepdims=1)
        normal = op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
        return op.Mul(normal, scale)

    def check(self, context: Any, x: ir.Value, **bound: ir.Value) -> MatchResult:
        """Require the last axis, a constant epsilon and a vector scale."""
        result = MatchResult()
        last = None if x.shape is None else len(x.shape) - 1
        if _integers(bound["axes"]) not in ([-1], [last]):
            return result.fail("the mean is not over the last axis", x)
        if _number(bound["epsilon"]) is None:
            return result.fail("epsilon is not a constant", x)
        if bound["scale"].shape is None or len(bound["scale"].shape) != 1:
            return result.fail("the scale is not a vector", x)
        return result

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value, **_: Any) -> ir.Value:
        """Emit the fused node."""
        return op.RMSNormalization(x, scale, axis=-1, epsilon=_number(epsilon), stash_type=1)


class TanhGelu(RewriteRuleClassBase):  # type: ignore[misc]
    """`x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))` is `Gelu` with `approximate="tanh"`."""

    def pattern(self, op: Any, x: Any) -> Any:
        """Match the formula as transformers writes it."""
        inner = op.Mul(op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715)), math.sqrt(2 / math.pi))
        return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))

    def rewrite(self, op: Any, x: ir.Value) -> ir.Value:
        """Emit the fused node."""
        return _like(op.Gelu(x, approximate="tanh"), x)


class DoubledUnary(RewriteRuleClassBase):  # type: ignore[misc]
    """`f(Concat(a, a))` is `Concat(f(a), f(a))` for a pointwise f."""

    def __init__(self, op_type: str) -> None:
        super().__init__(f"Doubled{op_type}", remove_nodes=False)
        self.op_type = op_type

    def pattern(self, op: Any, a: Any) -> Any:
        """Match the pointwise operator on a doubled value."""
        return getattr(op, self.op_type)(op.Concat(a, a, axis=-1))

    def rewrite(self, op: Any, a: ir.Value) -> ir.Value:
        """Compute one half, double it afterwards."""
        half = _like(getattr(op, self.op_type)(a), a)
        return op.Concat(half, half, axis=-1)


class DoubledScale(RewriteRuleClassBase):  # type: ignore[misc]
    """`Concat(a, a) * s` is `Concat(a * s, a * s)` for a scalar s."""

    def __init__(self) -> None:
        super().__init__("DoubledScale", remove_nodes=False)

    def pattern(self, op: Any, a: Any, s: Any) -> Any:
        """Match the product."""
        return op.Mul(op.Concat(a, a, axis=-1), s)

    def check(self, context: Any, s: ir.Value, **_: Any) -> MatchResult:
        """Require a constant scalar."""
        result = MatchResult()
        return result if _number(s) is not None else result.fail("not a constant scalar", s)

    def rewrite(self, op: Any, a: ir.Value, s: ir.Value) -> ir.Value:
        """Scale one half, double it afterwards."""
        half = _like(op.Mul(a, s), a)
        return op.Concat(half, half, axis=-1)


class Rotary(RewriteRuleClassBase):  # type: ignore[misc]
    """`x cos + (-x2, x1) sin` on [B, H, S, D] is `RotaryEmbedding` with cos and sin [B, S, D/2]."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        """Match a rotation of the two halves of x."""
        first = op.Slice(x, _allow_other_inputs=True, _outputs=["first"])
        second = op.Slice(x, _allow_other_inputs=True, _outputs=["second"])
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return op.Add(op.Mul(x, cos), op.Mul(rotated, sin))

    def check(self, context: Any, x: ir.Value, **bound: ir.Value) -> MatchResult:
        """Require equal halves of the last axis, and angles that are the same for all heads."""
        result = MatchResult()
        width = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
        if not isinstance(width, int) or width % 2:
            return result.fail("not [B, H, S, D] with a known, even D", x)
        halves = [_last_axis_range(bound[name], width) for name in ("first", "second")]
        if halves != [(0, width // 2), (width // 2, width)]:
            return result.fail("the slices are not the two halves", x)
        if _undoubled(bound["cos"]) is None or _undoubled(bound["sin"]) is None:
            return result.fail("cos or sin is not a doubled value", x)
        return result

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> ir.Value:
        """Emit the fused node on the halves."""
        return _like(op.RotaryEmbedding(x, _undoubled(cos), _undoubled(sin)), x)


class PartialRotary(RewriteRuleClassBase):  # type: ignore[misc]
    """A rotation of the first r channels alone is one node with `rotary_embedding_dim`."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        """Match the split, the rotation and the concatenation."""
        turned = op.Slice(x, _allow_other_inputs=True, _outputs=["turned"])
        passed = op.Slice(x, _allow_other_inputs=True, _outputs=["passed"])
        return op.Concat(op.RotaryEmbedding(turned, cos, sin), passed, axis=-1)

    def check(self, context: Any, x: ir.Value, turned: ir.Value, passed: ir.Value, **_: Any) -> MatchResult:
        """Require that the two slices are the two parts of the last axis."""
        result = MatchResult()
        width = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
        split = turned.shape[3] if turned.shape is not None else None
        if not isinstance(width, int) or not isinstance(split, int):
            return result.fail("unknown width", x)
        if [_last_axis_range(part, width) for part in (turned, passed)] != [(0, split), (split, width)]:
            return result.fail("the slices are not the two parts", turned)
        return result

    def rewrite(
        self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, turned: ir.Value, **_: Any
    ) -> ir.Value:
        """Emit one node over all channels."""
        return _like(op.RotaryEmbedding(x, cos, sin, rotary_embedding_dim=turned.shape[3]), x)


def _undoubled(angle: ir.Value) -> ir.Value | None:
    """Return c where `angle` is Unsqueeze(Concat(c, c), 1): [B, 1, S, D] -> [B, S, D/2]."""
    unsqueeze = angle.producer()
    if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or _integers(unsqueeze.inputs[1]) != [1]:
        return None
    concat = unsqueeze.inputs[0].producer()
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
        return None
    return concat.inputs[0] if concat.inputs[0] is concat.inputs[1] else None


def _last_axis_range(piece: ir.Value, width: int) -> tuple[int, int] | None:
    """Return the range that a Slice takes of the last axis of [B, H, S, width], or None."""
    _, start, end, axis, *step = (_integers(value) for value in piece.producer().inputs)
    if start is None or end is None or axis not in ([3], [-1]) or step not in ([], [[1]]):
        return None
    first, last = (bound + width if bound < 0 else min(bound, width) for bound in (start[0], end[0]))
    return first, last


def _integers(value: ir.Value | None) -> list[int] | None:
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in np.atleast_1d(value.const_value.numpy())]


def _number(value: ir.Value) -> float | None:
    if value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))


def _like(value: ir.Value, other: ir.Value) -> ir.Value:
    value.shape, value.type = other.shape, other.type
    return value
