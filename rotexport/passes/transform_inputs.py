"""Transforms of linears' inputs, made from text: online in front of them, their inverses in the weights.

Preserves the function within rounding: (x T)(T⁻¹ W) = x W, for every linear that reads x (FlatQuant). Where
T = diag(c) P and what writes x can take c up, a norm or the linear whose output is a factor of x, only P runs
online.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx_graphsurgeon as gs

from rotexport.graph.edit import consumers, producer
from rotexport.graph.sites import linears
from rotexport.graph.weights import Folded, InMemory, Scaled, set_weight, weight_of
from rotexport.passes.base import Pass, PassReport, Placement, Preserves, Where
from rotexport.passes.rotation import insert_online, own_constant
from rotexport.passes.smooth_inputs import linear_factor
from rotexport.transforms.transform import Composition, Diagonal, ScaledKronecker, Transform

NORMS: Final = ("RMSNormalization", "LayerNormalization")


class TransformInputs(Pass):
    """Put a transform in front of linears, given by the sites that share it."""

    name = "transform-inputs"
    preserves = Preserves.ROUNDING

    def __init__(self, transforms: Mapping[tuple[str, ...], Transform]) -> None:
        self._transforms = transforms

    def run(self, graph: gs.Graph) -> PassReport:
        sites = {linear.name: linear for linear in linears(graph)}
        report = PassReport()
        for group, transform in self._transforms.items():
            source, readers = sites[group[0]].input, [sites[name].node for name in group]
            for reader in readers:
                weight = own_constant(reader, 1)
                set_weight(weight, Folded(weight_of(weight), transform.contragredient(), axis=0))
            online, reason = transform, "made for this input"
            scale, rest = _apart(transform)
            if scale is not None:
                place = _take_up(graph, source, readers, scale)
                if place is not None:
                    online = rest
                    reason = f"{reason}; its scales are folded into the {place}"
            insert_online(graph, source, online, readers)
            report.changed += 1
            report.placements += [Placement("affine", name, Where.ONLINE, online, reason) for name in group]
        return report


def _apart(transform: Transform) -> tuple[Diagonal | None, Transform]:
    """Return the scale that a transform begins with, and what is left of it."""
    if isinstance(transform, ScaledKronecker):
        return transform.scale, ScaledKronecker(None, transform.pair)
    if isinstance(transform, Composition) and isinstance(transform.factors[0], Diagonal):
        return transform.factors[0], Composition(transform.factors[1:])
    return None, transform


def _take_up(graph: gs.Graph, source: gs.Variable, readers: list[gs.Node], scale: Diagonal) -> str | None:
    """Multiply a tensor by a scale where it is written; return that place, or None if there is none."""
    known = {id(reader) for reader in readers}
    others = any(id(node) not in known for node in consumers(source))
    if others or any(source is output for output in graph.outputs):
        return None
    writer, factors = producer(source), InMemory(scale.values)
    if writer is not None and writer.op in NORMS:
        vectors = range(1, len(writer.inputs))
        if any(tuple(writer.inputs[index].shape) != (scale.size,) for index in vectors):
            return None
        if not all(isinstance(writer.inputs[index], gs.Constant) for index in vectors):
            return None
        for index in vectors:
            vector = own_constant(writer, index)
            set_weight(vector, Scaled(weight_of(vector), factors, axis=0))
        return "norm"
    factor = linear_factor(source)
    if factor is None:
        return None
    weight = own_constant(factor, 1)
    set_weight(weight, Scaled(weight_of(weight), factors, axis=1))
    return "factor that a linear computes"
