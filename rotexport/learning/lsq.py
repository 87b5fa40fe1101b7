"""Rounding with gradients: the straight-through estimator, and LSQ, which is that estimator plus algebra.

    v̂ = s · clip(round(v / s), lowest, highest)

Backward, `round_clip` is the identity inside the range and 0 outside. Differentiating v̂ through it gives

    ∂v̂/∂v = 1 inside, 0 outside,     ∂v̂/∂s = round(v / s) − v / s inside, the nearer bound outside,

which is LSQ (Esser et al., Learned Step Size Quantization, equations 1 to 3), whatever s is made of: one
number, a channel's scale times a group's factor, or a token's maximum times a clip. It is also the exact
derivative of the quantizer smoothed over one step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _RoundClip(torch.autograd.Function):  # type: ignore[misc]  # torch is Any here
    @staticmethod
    def forward(ctx: Any, steps: Tensor, lowest: Any, highest: Any) -> Tensor:
        ctx.save_for_backward((steps >= lowest) & (steps <= highest))
        return steps.round().clamp_(lowest, highest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


class _ScaledGradient(torch.autograd.Function):  # type: ignore[misc]  # torch is Any here
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class _Narrowed(torch.autograd.Function):  # type: ignore[misc]  # torch is Any here
    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def round_clip(steps: Tensor, lowest: float | Tensor, highest: float | Tensor) -> Tensor:
    """Return the nearest integers, ties to even, within a range; the gradient is 0 outside it.

    The ends of the range are whole numbers, or tensors of such that broadcast against `steps`.
    """
    codes: Tensor = _RoundClip.apply(steps, lowest, highest)
    return codes


def fake_quantize(values: Tensor, scale: Tensor, lowest: float | Tensor, highest: float | Tensor) -> Tensor:
    """Return s · clip(round(v / s)) with LSQ's gradients; `scale` broadcasts against `values`."""
    return round_clip(values / scale, lowest, highest) * scale


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """Return `values`; their gradient is multiplied by `factor`."""
    result: Tensor = _ScaledGradient.apply(values, factor)
    return result


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values` as they come back from a narrower float type; the gradient passes."""
    result: Tensor = _Narrowed.apply(values, dtype)
    return result


def lsq_gradient_factor(count: int, highest: float) -> float:
    """Return 1 / √(N · highest), which balances a scale's gradient with those of the N numbers it scales."""
    return 1 / math.sqrt(count * highest)


def lsq_initial_scale(values: Tensor, highest: float) -> Tensor:
    """Return LSQ's first scale along the last axis, 2 · mean|v| / √highest, [..., 1]."""
    return values.abs().mean(-1, keepdim=True) * (2 / math.sqrt(highest))
