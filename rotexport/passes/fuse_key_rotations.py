"""R3 becomes part of attention over a window of codes.

    SinkWindowAttention...(FastHadamard(q), FastHadamard(q'), FastHadamard(k), ...)
        ->  SinkWindowAttention...Rotated(q, q', k, ..., tables)

Preserves the function within rounding. Runs after `StreamAttention`, for TensorRT with our kernels, which
rotate all three in one launch, where nodes take one each. Cached keys whose mean is stored apart keep their
nodes: the mean reads the rotated query, too.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.graph.edit import consumers, producer
from rotexport.graph.functions import DOMAIN
from rotexport.graph.weights import weight_of
from rotexport.passes.base import Pass, PassReport, Preserves, rounding

ROTATABLE: Final = tuple(
    f"SinkWindowAttentionInt{bits}{recent}" for bits in (8, 4, 2) for recent in ("", "Recent")
)
ROTATED: Final = (1, 2, 3)  # inputs: the query, that for sinks, the key


class FuseKeyRotations(Pass):
    """Let every attention rotate its queries and keys itself, where their rotation is a head's Hadamard."""

    name = "fuse-key-rotations"
    preserves = Preserves.ROUNDING

    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite every attention that can be; others keep their nodes."""
        self.preserves = rounding(graph)
        report = PassReport()
        for node in graph.nodes:
            if node.domain == DOMAIN and node.op in ROTATABLE:
                rotations = [producer(node.inputs[index]) for index in ROTATED]
                found = [rotation for rotation in rotations if rotation is not None]
                if len(found) == len(rotations) and _fit(node, found):
                    _fuse(graph, node, found)
                    report.changed += 1
        if report.changed:
            report.notes = [f"{report.changed} attentions rotate queries and keys themselves"]
        return report


def _fit(node: gs.Node, rotations: list[gs.Node]) -> bool:
    """Whether all rotations are one Hadamard of a power of two over whole heads, which nothing else reads."""
    if any(rotation.op != "FastHadamard" or rotation.domain != DOMAIN for rotation in rotations):
        return False
    if any(consumers(rotation.outputs[0]) != [node] for rotation in rotations):
        return False
    base, hi, lo = (_values(rotations[0].inputs[i]) for i in (2, 3, 4))
    whole = base.shape == (1, 1) and len(hi) * len(lo) == node.attrs["head_size"]
    return whole and all(
        np.array_equal(_values(one), _values(other))
        for rotation in rotations[1:]
        for one, other in zip(rotations[0].inputs[1:], rotation.inputs[1:], strict=True)
    )


def _values(table: gs.Constant) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    return weight_of(table).read()


def _fuse(graph: gs.Graph, node: gs.Node, rotations: list[gs.Node]) -> None:
    node.op += "Rotated"
    for index, rotation in zip(ROTATED, rotations, strict=True):
        node.inputs[index] = rotation.inputs[0]
    node.inputs.extend(list(rotations[0].inputs[1:]))
    for rotation in {id(rotation): rotation for rotation in rotations}.values():
        rotation.inputs.clear()
        rotation.outputs.clear()
        graph.nodes.remove(rotation)
