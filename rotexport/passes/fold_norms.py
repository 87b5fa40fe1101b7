"""Moves the scale (and shift) of a norm into the matrices that read it, leaving a norm without parameters.

Preserves the function within rounding: (n * scale + shift) W + b = n (diag(scale) W) + (b + shift W). What is
left commutes with every orthogonal map, which is what lets the residual stream rotate.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from rotexport.graph.basis import is_ones
from rotexport.graph.edit import consumers, replace_reads, unused_name
from rotexport.graph.sites import is_linear
from rotexport.graph.weights import BiasThrough, Scaled, constant, set_weight, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves
from rotexport.passes.center_layernorms import ones_like
from rotexport.passes.rotation import own_constant


class FoldNorms(Pass):
    """Fold every RMSNormalization whose output is read by constant MatMuls alone."""

    name = "fold-norms"
    preserves = Preserves.ROUNDING

    def run(self, graph: gs.Graph) -> PassReport:
        report = PassReport()
        for node in list(graph.nodes):
            if node.op != "RMSNormalization" or not isinstance(node.inputs[1], gs.Constant):
                continue
            shift = _shift(node)
            output = shift.outputs[0] if shift is not None else node.outputs[0]
            readers = consumers(output)
            is_output = any(output is tensor for tensor in graph.outputs)
            if not readers or is_output or not all(is_linear(n) and n.inputs[0] is output for n in readers):
                if not is_ones(node.inputs[1]):
                    report.notes.append(f"{node.name} keeps its scale: not only matrices read it")
                continue
            if shift is not None:
                _fold_shift(graph, shift, readers)
                report.changed += 1
            if not is_ones(node.inputs[1]):
                _fold_scale(graph, node, readers)
                report.changed += 1
        return report


def _shift(norm: gs.Node) -> gs.Node | None:
    """Return the Add of a constant vector that alone reads a norm, if there is one."""
    readers = consumers(norm.outputs[0])
    if len(readers) != 1 or readers[0].op != "Add":
        return None
    return readers[0] if isinstance(readers[0].inputs[1], gs.Constant) else None


def _fold_scale(graph: gs.Graph, norm: gs.Node, readers: list[gs.Node]) -> None:
    scale = norm.inputs[1]
    for reader in readers:
        weight = own_constant(reader, 1)
        set_weight(weight, Scaled(weight_of(weight), weight_of(scale), axis=0))
    norm.inputs[1] = ones_like(unused_name(graph, f"{scale.name}.folded"), scale)


def _fold_shift(graph: gs.Graph, shift: gs.Node, readers: list[gs.Node]) -> None:
    normed, vector = shift.inputs
    for reader in readers:
        bias = _bias(graph, reader)
        before = None if bias is None else weight_of(bias.inputs[1])
        carried = BiasThrough(weight_of(vector), weight_of(reader.inputs[1]), before)
        if bias is None:
            _append_bias(graph, reader, constant(unused_name(graph, f"{reader.name}.bias"), carried))
        else:
            set_weight(own_constant(bias, 1), carried)
    replace_reads(shift.outputs[0], normed, readers)
    shift.inputs.clear()
    shift.outputs.clear()
    graph.nodes.remove(shift)


def _bias(graph: gs.Graph, linear: gs.Node) -> gs.Node | None:
    readers = consumers(linear.outputs[0])
    if len(readers) != 1 or readers[0].op != "Add" or linear.outputs[0] is not readers[0].inputs[0]:
        return None
    vector = readers[0].inputs[1]
    return (
        readers[0] if isinstance(vector, gs.Constant) and vector.shape == linear.inputs[1].shape[1:] else None
    )


def _append_bias(graph: gs.Graph, linear: gs.Node, bias: gs.Constant) -> None:
    target = linear.outputs[0]
    product = gs.Variable(unused_name(graph, f"{target.name}.product"), target.dtype, target.shape)
    linear.outputs[0] = product
    add = gs.Node("Add", unused_name(graph, f"{linear.name}.add_bias"), {}, [product, bias], [target])
    graph.nodes.insert(graph.nodes.index(linear) + 1, add)
