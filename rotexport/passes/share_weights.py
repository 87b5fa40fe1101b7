"""Stores equal constants once, and an output head that is its embedding's transpose as that embedding.

Preserves the function exactly: constants are compared by the expressions that compute them. Tied embeddings
thus stay tied for as long as nothing that was folded tells them apart.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from rotexport.graph.edit import unused_name
from rotexport.graph.sites import is_linear
from rotexport.graph.weights import Weight, transpose, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves


class ShareWeights(Pass):
    """Merge constants that hold the same values."""

    name = "share-weights"
    preserves = Preserves.ROUNDING

    def run(self, graph: gs.Graph) -> PassReport:
        report = PassReport()
        first: dict[Weight, gs.Constant] = {}
        for node in graph.nodes:
            for index, tensor in enumerate(node.inputs):
                if isinstance(tensor, gs.Constant):
                    kept = first.setdefault(weight_of(tensor), tensor)
                    if kept is not tensor:
                        node.inputs[index] = kept
                        report.changed += 1
        for node in list(graph.nodes):
            if is_linear(node):
                table = first.get(transpose(weight_of(node.inputs[1])))
                if table is not None:
                    self._tie(graph, node, table)
                    report.changed += 1
        return report

    def _tie(self, graph: gs.Graph, linear: gs.Node, table: gs.Constant) -> None:
        weight = linear.inputs[1]
        turned = gs.Variable(unused_name(graph, f"{table.name}.transposed"), table.dtype, weight.shape)
        name = unused_name(graph, f"{linear.name}.tied")
        linear.inputs[1] = turned
        graph.nodes.insert(
            graph.nodes.index(linear), gs.Node("Transpose", name, {"perm": [1, 0]}, [table], [turned])
        )
