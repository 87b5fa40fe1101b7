"""The gated product in front of a down projection is balanced, channel by channel, before it is rotated.

    Mul(act, MatMul(x, U)), D   ->   Mul(act, MatMul(x, U diag(1/s))), diag(s) D

A Hadamard spreads quantization errors evenly over the channels, so the error of the product grows with
|x / s| |s D|_F, whether activations or weights are rounded. By Cauchy and Schwarz the least is reached where
s_j² = rms(x_j) / |D_j|: then every channel contributes alike to both factors. Preserves the function within
rounding, and costs nothing at run time (SmoothQuant's folding, arXiv 2211.10438, with a rotation behind it).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.graph.edit import consumers, producer
from rotexport.graph.sites import is_linear, linears
from rotexport.graph.weights import Array, InMemory, Scaled, set_weight, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves
from rotexport.passes.rotation import own_constant

STRONGEST = 32.0  # a channel is scaled by at most this, relative to the middle one


class SmoothDownInputs(Pass):
    """Balance every down projection whose input is a product with a linear's output."""

    name = "smooth-down-inputs"
    preserves = Preserves.ROUNDING

    def __init__(self, power: Mapping[str, Array]) -> None:
        """Take the root mean square of each channel [K] of every site's input, by site."""
        self._power = power

    def run(self, graph: gs.Graph) -> PassReport:
        report = PassReport()
        for linear in linears(graph):
            if linear.role != "down" or linear.name not in self._power:
                continue
            up = linear_factor(linear.input)
            if up is None:
                report.notes.append(f"{linear.name}: its input is no product with a linear; left as it is")
                continue
            smoother = smoothing(self._power[linear.name], weight_of(linear.weight).read())
            raised, lowered = own_constant(linear.node, 1), own_constant(up, 1)
            set_weight(raised, Scaled(weight_of(raised), InMemory(smoother), axis=0))
            set_weight(lowered, Scaled(weight_of(lowered), InMemory(1 / smoother), axis=1))
            report.changed += 1
        return report


def smoothing(power: Array, weight: Array) -> Array:
    """Return s [K] in float64 for inputs of root mean squares `power` [K] and a weight [K, N]."""
    norms = np.linalg.norm(weight.astype(np.float64), axis=1)
    used = (power > 0) & (norms > 0)
    if not used.any():
        return np.ones(len(norms))
    ratios = np.where(used, power.astype(np.float64), 1) / np.where(used, norms, 1)
    ratios[~used] = np.median(ratios[used])
    scales = np.sqrt(ratios / np.median(ratios[used]))
    result: Array = np.clip(scales, 1 / STRONGEST, STRONGEST)
    return result


def linear_factor(value: gs.Variable) -> gs.Node | None:
    """Return the linear whose output, used nowhere else, is a factor of a tensor that is read once."""
    product = producer(value)
    if product is None or product.op != "Mul" or len(consumers(value)) != 1:
        return None
    for tensor in product.inputs:
        writer = producer(tensor)
        if writer is not None and is_linear(writer) and len(consumers(tensor)) == 1:
            return writer
    return None
