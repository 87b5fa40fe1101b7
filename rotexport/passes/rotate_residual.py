"""R1: rotates the residual stream, folding one orthogonal map into everything that writes or reads it.

Preserves the function within rounding (QuaRot, section 4; SpinQuant's R1). Where post-norms write into the
stream (Gemma), their outputs are rotated online; anything else that pins the stream refuses R1.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from rotexport.graph.basis import Component, Pin, analyse, residual
from rotexport.passes.base import Pass, PassReport, Placement, Preserves, Where
from rotexport.passes.rotation import RotationSource, change_basis

NORMS = ("RMSNormalization", "LayerNormalization")


class RotateResidual(Pass):
    """Rotate the residual stream by one transform."""

    name = "rotate-residual"
    preserves = Preserves.ROUNDING

    def __init__(self, rotation: RotationSource) -> None:
        self.rotation = rotation

    def run(self, graph: gs.Graph) -> PassReport:
        stream = residual(analyse(graph))
        if stream is None:
            return _refused("the graph has no sum of activations")
        if (pin := obstacle(stream)) is not None:
            return _refused(f"pinned at {pin}")
        transform = self.rotation.transform(stream.size)
        online = change_basis(graph, stream, transform)
        where = Where.ONLINE if online else Where.FOLDED
        reason = f"{online} post-norms pin what they add to the stream" if online else ""
        placement = Placement("r1", "residual", where, transform, reason)
        return PassReport(len(stream.absorbers) + online, [], [placement])


def obstacle(stream: Component) -> Pin | None:
    """Return what keeps a residual stream from being rotated, if anything does."""
    return next((p for p in stream.pins if not p.writes or p.node is None or p.node.op not in NORMS), None)


def _refused(reason: str) -> PassReport:
    return PassReport(placements=[Placement("r1", "residual", Where.REFUSED, None, reason)])
