"""R3 becomes part of attention over a window of codes.

    SinkWindowAttention...(FastHadamard(q), FastHadamard(q'), FastHadamard(k), ...)
        ->  SinkWindowAttention...Rotated(q, q', k, ..., tables)

Preserves the function within rounding. Runs after `StreamAttention`, for TensorRT with our kernels, which
rotate all three in one launch, where nodes take one each. Where keys are centered the rotated query is also
multiplied by a table of the mean, q T M: the table becomes T M, and the product reads q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.graph.edit import consumers, producer
from rotexport.graph.functions import DOMAIN
from rotexport.graph.weights import Array, InMemory, set_weight, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves, rounding

ROTATABLE: Final = tuple(
    f"SinkWindowAttentionInt{bits}{center}{recent}"
    for bits in (8, 4, 2)
    for center in ("", "Centered")
    for recent in ("", "Recent")
)
ROTATED: Final = (1, 2, 3)  # inputs: the query, that for sinks, the key
MEAN_QUERY: Final = 9


class FuseKeyRotations(Pass):
    """Let every attention rotate its queries and keys itself, where their rotation is a head's Hadamard."""

    name = "fuse-key-rotations"
    preserves = Preserves.ROUNDING

    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite every attention that can be; others keep their nodes."""
        self.preserves = rounding(graph)
        report = PassReport()
        for node in list(graph.nodes):
            if node.domain == DOMAIN and node.op in ROTATABLE:
                rotations = [producer(node.inputs[index]) for index in ROTATED]
                found = [rotation for rotation in rotations if rotation is not None]
                mean = _mean_product(node) if "Centered" in node.op else None
                if len(found) == len(rotations) and _fit(node, found, mean):
                    if mean is not None:
                        _turn_table(mean, found[0])
                    _fuse(graph, node, found)
                    report.changed += 1
        if report.changed:
            report.notes = [f"{report.changed} attentions rotate queries and keys themselves"]
        return report


@dataclass(frozen=True)
class _MeanProduct:
    """Where a query meets the table of its heads' mean keys: Reshape(MatMul(Reshape(query), table))."""

    rows: gs.Node
    table: gs.Constant


def _mean_product(node: gs.Node) -> _MeanProduct | None:
    apart = producer(node.inputs[MEAN_QUERY])
    product = producer(apart.inputs[0]) if apart is not None and apart.op == "Reshape" else None
    if product is None or product.op != "MatMul" or not isinstance(product.inputs[1], gs.Constant):
        return None
    rows = producer(product.inputs[0])
    if rows is None or rows.op != "Reshape" or len(consumers(product.inputs[1])) != 1:
        return None
    return _MeanProduct(rows, product.inputs[1])


def _fit(node: gs.Node, rotations: list[gs.Node], mean: _MeanProduct | None) -> bool:
    """Whether all rotations are one Hadamard of a power of two over whole heads, which nothing else reads."""
    if any(rotation.op != "FastHadamard" or rotation.domain != DOMAIN for rotation in rotations):
        return False
    if "Centered" in node.op and (mean is None or mean.rows.inputs[0] is not rotations[0].outputs[0]):
        return False
    allowed = {id(node)} | ({id(mean.rows)} if mean is not None else set())
    if any(id(reader) not in allowed for one in rotations for reader in consumers(one.outputs[0])):
        return False
    base, hi, lo = (_values(rotations[0].inputs[i]) for i in (2, 3, 4))
    whole = base.shape == (1, 1) and len(hi) * len(lo) == node.attrs["head_size"]
    return whole and all(
        np.array_equal(_values(one), _values(other))
        for rotation in rotations[1:]
        for one, other in zip(rotations[0].inputs[1:], rotation.inputs[1:], strict=True)
    )


def _values(table: gs.Constant) -> Array:
    return weight_of(table).read()


def _turn_table(mean: _MeanProduct, rotation: gs.Node) -> None:
    """Let the product with the mean read what the rotation reads."""
    signs, base, hi, lo = (_values(table).astype(np.float64) for table in rotation.inputs[1:])
    hadamard = np.kron(np.kron(base, hi), lo)
    turn = signs[:, None] * hadamard / np.sqrt(len(hadamard))
    table = _values(mean.table)
    set_weight(mean.table, InMemory((turn @ table.astype(np.float64)).astype(table.dtype)))
    mean.rows.inputs[0] = rotation.inputs[0]


def _fuse(graph: gs.Graph, node: gs.Node, rotations: list[gs.Node]) -> None:
    node.op += "Rotated"
    for index, rotation in zip(ROTATED, rotations, strict=True):
        node.inputs[index] = rotation.inputs[0]
    node.inputs.extend(list(rotations[0].inputs[1:]))
    for rotation in {id(rotation): rotation for rotation in rotations}.values():
        rotation.inputs.clear()
        rotation.outputs.clear()
        graph.nodes.remove(rotation)
