"""Learned transforms of linears' inputs: online in front of them, their inverses in the weights.

Preserves the function within rounding: (x T)(T⁻¹ W) = x W, for every linear that reads x (FlatQuant).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from rotexport.graph.sites import linears
from rotexport.graph.weights import Folded, set_weight, weight_of
from rotexport.passes.base import Pass, PassReport, Placement, Preserves, Where
from rotexport.passes.rotation import insert_online, own_constant
from rotexport.transforms.transform import Transform


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
            readers = [sites[name].node for name in group]
            for reader in readers:
                weight = own_constant(reader, 1)
                set_weight(weight, Folded(weight_of(weight), transform.contragredient(), axis=0))
            insert_online(graph, sites[group[0]].input, transform, readers)
            report.changed += 1
            reason = "learned for this input"
            report.placements += [
                Placement("affine", name, Where.ONLINE, transform, reason) for name in group
            ]
        return report
