"""GPTQ against its definition, and against plain rounding on its own objective."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotexport.errors import RecipeError
from rotexport.quant.formats import weight_format
from rotexport.quant.gptq import damped, descend, gptq, inverse_factor, loss
from rotexport.quant.grids import AsymmetricFactors, AsymmetricScales, FreeScales, Grid, IntegerFactors
from rotexport.quant.scales import AsymmetricRounding, ScaledRounding
from rotexport.quant.scheme import GptqSettings

INT4 = weight_format("int4")


def problem(inputs: int, outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight and the second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((4 * inputs, inputs)) @ rng.standard_normal((inputs, inputs)) / inputs**0.5
    return rng.standard_normal((inputs, outputs)), damped(mixed.T @ mixed / len(mixed), 0.01)


class FixedScales(Grid):
    """Scales known from the start, so that two implementations see the same grid."""

    def __init__(self, weight: np.ndarray, group: int) -> None:
        super().__init__(INT4, group)
        groups = weight.reshape(-1, group, weight.shape[1])
        self.values = (np.abs(groups).max(axis=1) / 7).astype(np.float32)

    def fit(self, index, rows, importance) -> None:
        pass

    def scales(self, index):
        return self.values[index]

    def refit(self, codes, hessian, target) -> None:
        pass

    def finish(self, codes):
        raise NotImplementedError


def optimal_brain_quantization(weight, hessian, scales, order) -> np.ndarray:
    """Quantize one input channel after another; after each, solve exactly for all that are still free.

    This is the definition that GPTQ's triangular factor is a shortcut for: with the rows F free and the rest
    fixed at error d, the loss is least where H_FF d_F = -H_FR d_R.
    """
    values, codes = weight.copy(), np.zeros_like(weight)
    for step, row in enumerate(order):
        codes[row] = np.clip(np.rint(values[row] / scales[row]), -8, 7)
        values[row] = codes[row] * scales[row]
        fixed, free = order[: step + 1], order[step + 1 :]
        shift = np.linalg.solve(
            hessian[np.ix_(free, free)], hessian[np.ix_(free, fixed)] @ (values - weight)[fixed]
        )
        values[free] = weight[free] - shift
    return codes


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize(("inputs", "group", "block"), [(24, 24, 5), (24, 8, 16), (24, 4, 7), (30, 6, 128)])
def test_it_is_optimal_brain_quantization(order: str, inputs: int, group: int, block: int) -> None:
    weight, hessian = problem(inputs, 9)
    grid = FixedScales(weight, group)
    codes = gptq(weight, hessian, grid, GptqSettings(order=order, block=block))
    places = np.argsort(-hessian.diagonal(), kind="stable") if order == "activation" else np.arange(inputs)
    expected = optimal_brain_quantization(weight, hessian, grid.expanded(inputs), places)
    scales = grid.expanded(inputs)
    assert abs(loss(weight, codes * scales, hessian) - loss(weight, expected * scales, hessian)) < 1e-6
    np.testing.assert_array_equal(codes, expected)


@given(st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_factor_is_that_of_the_inverse(size: int, seed: int) -> None:
    _, hessian = problem(size, 1, seed)
    upper = inverse_factor(hessian)
    np.testing.assert_array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ hessian, np.eye(size), atol=1e-6)


GRIDS = {
    FreeScales: ScaledRounding,
    IntegerFactors: partial(ScaledRounding, two_level=True),
    AsymmetricScales: AsymmetricRounding,
    AsymmetricFactors: partial(AsymmetricRounding, two_level=True),
}


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("group", [16, 64])
def test_every_step_lowers_the_loss(kind: type[Grid], group: int) -> None:
    weight, hessian = problem(64, 48)
    rounded = GRIDS[kind](INT4, group, search=True).quantize(weight)
    grid = kind(INT4, weight, group)
    codes = gptq(weight, hessian, grid, GptqSettings())
    after_gptq = loss(weight, dequantized(grid.finish(codes), group), hessian)
    codes = descend(weight, codes, hessian, grid, GptqSettings(sweeps=2))
    after_sweeps = loss(weight, dequantized(grid.finish(codes), group), hessian)
    codes = descend(weight, codes, hessian, grid, GptqSettings(sweeps=2))
    after_more = loss(weight, dequantized(grid.finish(codes), group), hessian)
    # Strongly correlated inputs: compensation takes more than a third off; descent some percent of the rest.
    assert after_gptq < 0.65 * loss(weight, dequantized(rounded, group), hessian)
    assert after_sweeps < 0.99 * after_gptq
    assert after_more <= after_sweeps * (1 + 1e-5)  # scales are kept in float32


def dequantized(result, group: int) -> np.ndarray:
    scales = result.scales if result.factors is None else result.scales * result.factors
    codes = result.codes.astype(np.float64)
    if result.zeros is not None:
        codes -= np.repeat(result.zeros.astype(np.float64), group, axis=0)
    return codes * np.repeat(scales, group, axis=0)


def fitted_levels(rows: np.ndarray, importance: np.ndarray) -> tuple[float, float]:
    """Search the ends of one group's 16 levels: least weighted error, scale and zero point."""
    best = (np.inf, 1.0, 0.0)
    for clip in np.linspace(1.0, 0.5, 24):
        least, most = min(0.0, rows.min()) * clip, max(0.0, rows.max()) * clip
        scale = (most - least) / 15
        zero = np.clip(np.rint(-8 - least / scale), -8, 7)
        steps = np.clip(np.rint(rows / scale), -8 - zero, 7 - zero)
        best = min(best, (float(importance @ (steps * scale - rows) ** 2), scale, zero))
    return best[1], best[2]


def asymmetric_reference(weight, hessian, group, order) -> np.ndarray:
    """Quantize with zero points, channel by channel of the output, fitting levels to the updated weight.

    The free inputs are solved for densely after every step; importance is the loss that an error of one input
    leaves once all later inputs have made up for it: the Schur complement's entry.
    """
    result = np.empty_like(weight)
    inputs = len(weight)
    importance = np.empty(inputs)
    for step, row in enumerate(order):
        later = order[step + 1 :]
        inner = np.linalg.solve(hessian[np.ix_(later, later)], hessian[later, row])
        importance[row] = hessian[row, row] - hessian[row, later] @ inner
    natural = (order == np.arange(inputs)).all()
    for n in range(weight.shape[1]):
        values, levels = weight[:, n].copy(), {}
        if not natural:
            for g in range(inputs // group):
                rows = slice(g * group, (g + 1) * group)
                levels[g] = fitted_levels(weight[rows, n], hessian.diagonal()[rows])
        for step, row in enumerate(order):
            g = row // group
            if g not in levels:
                rows = slice(g * group, (g + 1) * group)
                levels[g] = fitted_levels(values[rows], importance[rows])
            scale, zero = np.float64(np.float32(levels[g][0])), levels[g][1]
            values[row] = np.clip(np.rint(values[row] / scale), -8 - zero, 7 - zero) * scale
            fixed, free = order[: step + 1], order[step + 1 :]
            shift = np.linalg.solve(
                hessian[np.ix_(free, free)], hessian[np.ix_(free, fixed)] @ (values - weight[:, n])[fixed]
            )
            values[free] = weight[free, n] - shift
        result[:, n] = values
    return result


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize(("inputs", "group"), [(24, 24), (24, 8), (30, 6)])
def test_with_zero_points_it_is_what_a_dense_solution_gives(order: str, inputs: int, group: int) -> None:
    weight, hessian = problem(inputs, 7)
    weight += 0.7  # leaning to one side
    grid = AsymmetricScales(weight_format("int4", symmetric=False), weight, group)
    codes = gptq(weight, hessian, grid, GptqSettings(order=order, block=5))
    places = np.argsort(-hessian.diagonal(), kind="stable") if order == "activation" else np.arange(inputs)
    expected = asymmetric_reference(weight, hessian, group, places)
    found = dequantized(grid.finish(codes), group)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert abs(loss(weight, found, hessian) - loss(weight, expected, hessian)) < 1e-6


@pytest.mark.parametrize(
    ("with_zero_points", "without"), [(AsymmetricScales, FreeScales), (AsymmetricFactors, IntegerFactors)]
)
@pytest.mark.parametrize("group", [16, 64])
def test_zero_points_lower_the_loss_of_weights_that_lean_to_one_side(
    with_zero_points: type[Grid], without: type[Grid], group: int
) -> None:
    weight, hessian = problem(64, 48)
    weight += 0.7
    losses = []
    for kind in (with_zero_points, without):
        grid = kind(INT4, weight, group)
        codes = gptq(weight, hessian, grid, GptqSettings())
        losses.append(loss(weight, dequantized(grid.finish(codes), group), hessian))
    assert losses[0] < 0.8 * losses[1]


def test_no_code_times_its_factor_leaves_int8() -> None:
    weight, hessian = problem(64, 48)
    weight[:16] += 5  # zero points at the end of the range, where the farthest code counts 15
    grid = AsymmetricFactors(INT4, weight, 16)
    codes = descend(weight, gptq(weight, hessian, grid, GptqSettings()), hessian, grid, GptqSettings())
    found = grid.finish(codes)
    integers = (found.codes.astype(int) - np.repeat(found.zeros.astype(int), 16, axis=0)) * np.repeat(
        found.factors, 16, axis=0
    )
    assert 15 in codes and found.factors.max() > 8
    assert 100 < np.abs(integers).max() <= 127


def test_without_correlation_it_is_rounding() -> None:
    weight, _ = problem(32, 8)
    grid = FixedScales(weight, 8)
    codes = gptq(weight, np.eye(32), grid, GptqSettings())
    np.testing.assert_array_equal(codes, INT4.round(weight / grid.expanded(32)))
    np.testing.assert_array_equal(descend(weight, codes, np.eye(32), grid, GptqSettings()), codes)


def test_inputs_that_never_fire_are_harmless() -> None:
    weight, hessian = problem(32, 8)
    dead = hessian.copy()
    dead[5], dead[:, 5] = 0, 0
    grid = FreeScales(INT4, weight, 16)
    codes = gptq(weight, damped(dead, 0.01), grid, GptqSettings())
    assert np.isfinite(codes).all() and np.isfinite(grid.expanded(32)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"damping": 0}, r"gptq\.damping: 0 is not above 0"),
        ({"order": "act"}, r"gptq\.order: 'act' is not one of natural, activation"),
        ({"sweeps": -1}, r"gptq\.sweeps: -1"),
    ],
)
def test_impossible_settings_are_refused(fields, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GptqSettings(**fields)
