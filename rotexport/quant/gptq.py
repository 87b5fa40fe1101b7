"""GPTQ (arXiv 2210.17323) as QuaRot uses it on rotated inputs, with refinements on the same objective.

A product y = x W with W [K, N] and inputs whose second moments are H = E[xᵀx] [K, K] loses

    E |x (Q - W)|² = sum over output channels n of (q_n - w_n)ᵀ H (q_n - w_n).

GPTQ fixes one input channel after the other and lets those that are still free make up for its error: with
U upper triangular and UᵀU = H⁻¹, rounding row j by e = (w_j - q_j) / U_jj moves row k > j by -e U_jk. What
that leaves is then lowered further: a few input channels at a time are chosen anew, by GPTQ given all others,
and scales take the value of least squares given all codes. None of these steps can raise the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch

from rotexport.graph.weights import Array
from rotexport.quant.grids import Grid
from rotexport.quant.scheme import GptqSettings

TOGETHER: Final = 64  # input channels that descent chooses together


def damped(hessian: Array, damping: float) -> Array:
    """Return H with `damping` times its mean diagonal added, and ones where an input never fired."""
    result = hessian.copy()
    diagonal = result.diagonal().copy()
    extra = damping * diagonal.mean() + (diagonal == 0)
    result[np.diag_indices_from(result)] += extra
    return result


def loss(weight: Array, quantized: Array, hessian: Array) -> float:
    """Return sum of (q - w)ᵀ H (q - w) over output channels, for matrices [K, N]."""
    error = quantized - weight
    return float(np.vdot(error, hessian @ error))


def gptq(weight: Array, hessian: Array, grid: Grid, settings: GptqSettings) -> Array:
    """Quantize a matrix [K, N] onto `grid`, fitting its scales on the way; return codes [K, N] as floats.

    Codes are counted from the grid's zero points. `hessian` [K, K] is positive definite (see `damped`).
    Everything is computed in the type of `weight`.
    """
    permutation = np.arange(len(weight))
    if settings.order == "activation":
        grid.fit_all(weight, hessian.diagonal().astype(weight.dtype))
        permutation = np.argsort(-hessian.diagonal(), kind="stable")
    upper = inverse_factor(hessian[np.ix_(permutation, permutation)]).astype(weight.dtype)
    remaining = weight[permutation]
    importance = upper.diagonal() ** -2
    codes = np.empty_like(remaining)
    for start, stop in _spans(len(weight), grid.group, settings.block):
        errors = np.empty_like(remaining[start:stop])
        for row in range(start, stop):
            if settings.order == "natural" and row % grid.group == 0:
                members = slice(row, row + grid.group)
                grid.fit(row // grid.group, remaining[members], importance[members])
            scale = grid.scales(permutation[row] // grid.group)
            codes[row] = grid.rounded(remaining[row] / scale, permutation[row] // grid.group)
            errors[row - start] = (remaining[row] - codes[row] * scale) / upper[row, row]
            remaining[row + 1 : stop] -= np.outer(upper[row, row + 1 : stop], errors[row - start])
        remaining[stop:] -= upper[start:stop, stop:].T @ errors
    ordered = np.empty_like(codes)
    ordered[permutation] = codes
    return ordered


def descend(weight: Array, codes: Array, hessian: Array, grid: Grid, settings: GptqSettings) -> Array:
    """Return better codes: rounds over all input channels, scales refitted before each and at the end."""
    codes = codes.copy()
    hessian = hessian.astype(weight.dtype)
    target = hessian @ weight
    order = np.random.default_rng(0)
    for _ in range(settings.sweeps):
        grid.refit(codes, hessian, target)
        _sweep(codes, hessian, target, grid, order.permutation(len(codes)))
    if settings.sweeps:
        grid.refit(codes, hessian, target)
    return codes


def _sweep(codes: Array, hessian: Array, target: Array, grid: Grid, order: Array) -> None:
    """Choose rows of codes anew, in place, some at a time in `order`; others stay as they are meanwhile.

    Where the new codes of an output channel have a larger loss than the old, the old ones stay.
    """
    scales = grid.expanded(len(codes))
    values = codes * scales
    slope = hessian @ values - target  # half the gradient
    for rows in np.array_split(order, max(1, len(order) // TOGETHER)):
        inner = hessian[np.ix_(rows, rows)]
        upper = inverse_factor(inner).astype(values.dtype)
        free = values[rows] - upper.T @ (upper @ slope[rows])  # best real values
        chosen, moves = np.empty_like(free), np.empty_like(free)
        for place, row in enumerate(rows):
            chosen[place] = grid.rounded(free[place] / scales[row], row // grid.group)
            value = chosen[place] * scales[row]
            moves[place] = value - values[row]
            error = (free[place] - value) / upper[place, place]
            free[place + 1 :] -= np.outer(upper[place, place + 1 :], error)
        change = np.einsum("kn,kn->n", moves, 2 * slope[rows] + inner @ moves)
        moves[:, change >= 0] = 0
        codes[rows] = np.where(change < 0, chosen, codes[rows])
        values[rows] += moves
        slope += hessian[:, rows] @ moves


def inverse_factor(hessian: Array) -> Array:
    """Return U, upper triangular in float64, with UᵀU = H⁻¹.

    H turned by 180 degrees is L Lᵀ; turned back, H = R Rᵀ with R upper triangular, so U = R⁻¹ is, too.
    """
    turned = torch.linalg.cholesky(torch.from_numpy(hessian[::-1, ::-1].astype(np.float64)))
    identity = torch.eye(len(turned), dtype=torch.float64)
    result: Array = torch.linalg.solve_triangular(turned, identity, upper=False).numpy()
    return result[::-1, ::-1]


def _spans(length: int, group: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield spans of at most `block` rows such that a group of rows always begins where a span does.

    Its scale is fitted on rows that all earlier errors have reached. Groups shorter than a block share one:
    inside a span every row is up to date.
    """
    step = max(1, block // group) * group if group <= block else group
    for outer in range(0, length, step):
        end = min(outer + step, length)
        inner = step if group <= block else block
        for start in range(outer, end, inner):
            yield start, min(start + inner, end)
