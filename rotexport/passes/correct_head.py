"""Folds a map of the head's inputs into its weight, W -> M W, to take up what error the blocks leave there.

Changes the function on purpose: of the quantized network, towards the float one's (`rotexport.blocks.head`).
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from rotexport.graph.sites import output_head
from rotexport.graph.weights import Array, Folded, set_weight, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves
from rotexport.passes.rotation import own_constant
from rotexport.transforms.transform import InvertibleMatrix


class CorrectHead(Pass):
    """Multiply the output head's weight [K, V] by a matrix [K, K] from the left."""

    name = "correct-head"
    preserves = Preserves.CHANGED

    def __init__(self, matrix: Array) -> None:
        self._matrix = matrix

    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite the head's weight; an embedding tied to it stays as it is.

        Raises:
            GraphError: no matrix product makes the logits, or the matrix does not fit it.

        """
        weight = own_constant(output_head(graph).node, 1)
        set_weight(weight, Folded(weight_of(weight), InvertibleMatrix(self._matrix.T), axis=0))
        return PassReport(1)
