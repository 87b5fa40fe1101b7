"""R4 and the head-axis rotation: an online transform in front of one linear, its inverse in the weights.

Preserves the function within rounding: (x T)(T^-1 W) = x W. R4 (SpinQuant; QuaRot, stage 1b) spreads the
outliers of the gated product before the down projection; the head-axis Hadamard (QuaRot, stage 1c) mixes
heads before the output projection.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from rotexport.errors import TransformError
from rotexport.graph.sites import Linear, linears
from rotexport.graph.weights import Folded, set_weight, weight_of
from rotexport.passes.base import Pass, PassReport, Placement, Preserves, Where
from rotexport.passes.rotation import insert_online, own_constant
from rotexport.recipe import Rotation
from rotexport.transforms.transform import HeadMix, Transform


class RotateDownInputs(Pass):
    """Transform the input of every down projection (r4)."""

    name = "rotate-down-inputs"
    preserves = Preserves.ROUNDING

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation

    def run(self, graph: gs.Graph) -> PassReport:
        report = PassReport()
        for linear in linears(graph):
            if linear.role == "down":
                transform = self.rotation.transform(linear.weight.shape[0])
                _rotate_input(graph, linear, transform)
                reason = "a product or nonlinearity pins its input"
                report.changed += 1
                report.placements.append(Placement("r4", linear.name, Where.ONLINE, transform, reason))
        return report


class MixHeads(Pass):
    """Mix the heads in front of every output projection (o_heads)."""

    name = "mix-heads"
    preserves = Preserves.ROUNDING

    def run(self, graph: gs.Graph) -> PassReport:
        report = PassReport()
        head_sizes = {
            block: int(node.outputs[0].shape[3])
            for block, node in enumerate(n for n in graph.nodes if n.op == "Attention")
        }
        for linear in linears(graph):
            if linear.role == "output" and linear.block is not None:
                width = linear.weight.shape[0]
                transform, reason = _head_transform(width, head_sizes[linear.block])
                _rotate_input(graph, linear, transform)
                report.changed += 1
                report.placements.append(Placement("o_heads", linear.name, Where.ONLINE, transform, reason))
        return report


def _head_transform(width: int, head_size: int) -> tuple[Transform, str]:
    heads = width // head_size
    try:
        return HeadMix(heads, head_size), "attention keeps heads apart"
    except TransformError:
        reason = f"no Hadamard matrix of order {heads} (heads) is known: one over the whole width instead"
        return Rotation(kind="hadamard").transform(width), reason


def _rotate_input(graph: gs.Graph, linear: Linear, transform: Transform) -> None:
    """Put T in front of a linear and T^-1 into its weight."""
    weight = own_constant(linear.node, 1)
    set_weight(weight, Folded(weight_of(weight), transform.contragredient(), axis=0))
    insert_online(graph, linear.input, transform, [linear.node])
