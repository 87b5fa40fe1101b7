"""Gradients of fake quantizers against finite differences of the quantizer smoothed over one step."""

import math

import pytest
import torch

from rotexport.learning.lsq import (
    fake_quantize,
    lsq_gradient_factor,
    lsq_initial_scale,
    narrowed,
    round_clip,
    scale_gradient,
)

LOWEST, HIGHEST = -8.0, 7.0
OFFSETS = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 - 0.5  # a uniform grid over one step


def smoothed(value: float, scale: float) -> float:
    """Mean of s · clip(round(v / s + u)) over u in (-1/2, 1/2)."""
    return scale * float((value / scale + OFFSETS).round().clamp(LOWEST, HIGHEST).mean())


def gradients(value: float, scale: float) -> tuple[float, float]:
    v = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    fake_quantize(v, s, LOWEST, HIGHEST).backward()
    return float(v.grad), float(s.grad)


@pytest.mark.parametrize("value", [-9.3, -3.7, -0.2, 0.6, 2.5, 5.9, 8.4, 40.0])
@pytest.mark.parametrize("scale", [0.31, 1.0, 1.7])
def test_value_gradient_is_that_of_the_smoothed_quantizer(value: float, scale: float) -> None:
    step = 0.05
    difference = (smoothed(value + step, scale) - smoothed(value - step, scale)) / (2 * step)
    assert gradients(value, scale)[0] == pytest.approx(difference, abs=2e-3)  # the grid's 20,000 points


@pytest.mark.parametrize("value", [-30.0, 9.0, 12.5])
def test_no_gradient_outside_the_range(value: float) -> None:
    assert gradients(value, 1.0) == (0.0, LOWEST if value < 0 else HIGHEST)


@pytest.mark.parametrize("value", [-20.0, 3.3, -0.2, 18.0])
def test_scale_gradient_is_lsqs(value: float) -> None:
    """Smoothed at fixed codes: s · clip(round(v/s)) has slope `code`, and the smoothed round slope -v/s."""
    scale, step = 1.3, 1e-3
    code = float(torch.tensor(value / scale).round().clamp(LOWEST, HIGHEST))
    rounding = (
        smoothed(value, scale + step) / (scale + step) - smoothed(value, scale - step) / (scale - step)
    ) / (2 * step)
    assert gradients(value, scale)[1] == pytest.approx(code + scale * rounding, abs=0.06)


def test_forward_is_round_half_to_even_then_clip() -> None:
    steps = torch.tensor([-9.0, -2.5, -0.5, 0.5, 1.5, 7.4, 99.0])
    assert round_clip(steps, LOWEST, HIGHEST).tolist() == [-8, -2, 0, 0, 2, 7, 7]


def test_gradient_factor_changes_the_gradient_alone() -> None:
    x = torch.tensor([0.1, -3.3], requires_grad=True)
    factor = lsq_gradient_factor(count=64, highest=7)
    y = scale_gradient(x, factor)
    assert torch.equal(y, x)
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx([1 / math.sqrt(64 * 7)] * 2)


def test_narrowed_rounds_forward_and_passes_backward() -> None:
    x = torch.tensor([1 / 3], requires_grad=True)
    y = narrowed(x, torch.float16)
    assert y.item() == float(torch.tensor(1 / 3).half())
    y.backward()
    assert x.grad.item() == 1


def test_first_scale_is_lsqs() -> None:
    values = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    expected = torch.tensor([[2 * 2.0], [2 * 0.5]]) / math.sqrt(7)
    torch.testing.assert_close(lsq_initial_scale(values, 7), expected)
