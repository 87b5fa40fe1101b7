"""Learned transforms within attention heads: of values, folded, and of queries and keys, online.

Preserve the function within rounding: softmax(q k') (v T) = (softmax(q k') v) T, and (q T⁻ᵀ)(k T)' = q k'
(FlatQuant's vcache and kcache transforms, arXiv 2410.09426). Unlike rotations, T need not be orthogonal, so
queries take its contragredient. What the cache holds is v T and k T.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from rotexport.errors import GraphError
from rotexport.graph.basis import analyse, attention_nodes, new_key
from rotexport.graph.edit import consumers
from rotexport.passes.base import Pass, PassReport, Placement, Preserves, Where
from rotexport.passes.rotation import change_basis, insert_online
from rotexport.transforms.transform import Transform


class TransformValues(Pass):
    """Put the values of blocks, given by number, into another basis within every head."""

    name = "transform-values"
    preserves = Preserves.ROUNDING

    def __init__(self, transforms: Mapping[int, Transform]) -> None:
        self._transforms = transforms

    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite weights and biases.

        Raises:
            GraphError: something pins the basis of a block's values.

        """
        bases, report = analyse(graph), PassReport()
        for block, attention in attention_nodes(graph):
            transform = self._transforms.get(block)
            if transform is None:
                continue
            component = bases.at(attention.inputs[2])
            if component is None or not component.free:
                raise GraphError(f"the values of block {block} cannot change their basis")
            change_basis(graph, component, transform)
            report.changed += len(component.absorbers)
            report.placements.append(
                Placement("affine", f"{block}.value", Where.FOLDED, transform, "learned for the values")
            )
        return report


class TransformKeys(Pass):
    """Multiply the keys of blocks, given by number, by a transform, and queries by its contragredient."""

    name = "transform-keys"
    preserves = Preserves.ROUNDING

    def __init__(self, transforms: Mapping[int, Transform]) -> None:
        self._transforms = transforms

    def run(self, graph: gs.Graph) -> PassReport:
        report = PassReport()
        for block, attention in list(attention_nodes(graph)):
            transform = self._transforms.get(block)
            if transform is None:
                continue
            key = new_key(attention)
            insert_online(graph, key, transform, consumers(key))
            insert_online(graph, attention.inputs[0], transform.contragredient(), [attention])
            report.changed += 2
            report.placements.append(
                Placement("affine", f"{block}.key", Where.ONLINE, transform, "learned for cached keys")
            )
        return report
