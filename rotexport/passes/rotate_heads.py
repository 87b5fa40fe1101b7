"""R2 and R3: rotate values and outputs, or queries and keys, by one orthogonal map per head.

Preserves the function within rounding: attention mixes tokens, not features, so softmax(q k') (v T) =
(softmax(q k') v) T, and (q T)(k T)' = q k' (SpinQuant's R2 and R3). Rotated keys and values are what the
cache holds. A rotation that a rotary embedding keeps from being folded goes online behind it.
"""

from __future__ import annotations

from typing import Literal

import onnx_graphsurgeon as gs

from rotexport.graph.basis import Component, analyse, attention_nodes
from rotexport.passes.base import Pass, PassReport, Placement, Preserves, Where
from rotexport.passes.rotation import RotationSource, change_basis


class RotateHeads(Pass):
    """Rotate each attention's values ("r2") or queries and keys ("r3") within every head."""

    preserves = Preserves.ROUNDING

    def __init__(self, rotation: RotationSource, which: Literal["r2", "r3"]) -> None:
        self.rotation = rotation
        self.which = which
        self.name = "rotate-values" if which == "r2" else "rotate-keys"

    def run(self, graph: gs.Graph) -> PassReport:
        report = PassReport()
        done: list[Component] = []
        bases = analyse(graph)
        for block, attention in attention_nodes(graph):
            component = bases.at(attention.inputs[2 if self.which == "r2" else 0])
            if component is None or any(component is other for other in done):
                continue  # a cache shared with an earlier block
            done.append(component)
            self._rotate(graph, component, block, report)
        return report

    def _rotate(self, graph: gs.Graph, component: Component, block: int, report: PassReport) -> None:
        site = f"{block}.{'value' if self.which == 'r2' else 'key'}"
        obstacle = next((pin for pin in component.pins if not pin.writes), None)
        if obstacle is not None:
            report.placements.append(
                Placement(self.which, site, Where.REFUSED, None, f"pinned at {obstacle}")
            )
            return
        transform = self.rotation.transform(component.size, block)
        reason = "; ".join(str(pin) for pin in component.pins[:2])
        online = change_basis(graph, component, transform)
        where = Where.ONLINE if online else Where.FOLDED
        report.changed += len(component.absorbers) + online
        report.placements.append(Placement(self.which, site, where, transform, reason))
