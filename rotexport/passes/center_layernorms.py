"""Turns LayerNormalization into RMSNormalization: the mean subtraction moves into the stream's producers.

Preserves the function within rounding: when every vector that is added to the residual stream has zero mean
over features, so has their sum, and LayerNorm(x) = RMSNorm(x) * scale + bias (QuaRot, section 4).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.graph.basis import Bases, Component, analyse
from rotexport.graph.edit import unused_name
from rotexport.graph.weights import Centered, InMemory, constant, set_weight, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves
from rotexport.passes.rotation import own_constant


class CenterLayerNorms(Pass):
    """Replace each LayerNormalization of a stream whose producers can all be centred."""

    name = "center-layernorms"
    preserves = Preserves.ROUNDING

    def run(self, graph: gs.Graph) -> PassReport:
        report = PassReport()
        bases = analyse(graph)
        streams = {}
        for node in graph.nodes:
            if node.op != "LayerNormalization":
                continue
            reason = self._obstacle(bases, node)
            if reason:
                report.notes.append(f"{node.name} stays a LayerNormalization: {reason}")
                continue
            component = bases.at(node.inputs[0])
            assert component is not None
            streams[id(component)] = component
            self._replace(graph, node)
            report.changed += 1
        for component in streams.values():
            self._center(component)
        return report

    def _obstacle(self, bases: Bases, node: gs.Node) -> str:
        stream = bases.at(node.inputs[0])
        if stream is None or node.attrs.get("axis", -1) not in (-1, len(node.inputs[0].shape) - 1):
            return "it does not normalize the last axis"
        others = [pin for pin in stream.pins if pin.writes or pin.node is None or pin.node.op != node.op]
        if others:
            return f"its input cannot be centred at {others[0]}"
        if any(absorber.consumes for absorber in stream.absorbers):
            return "its input is also read without normalization"
        return ""

    def _replace(self, graph: gs.Graph, node: gs.Node) -> None:
        source, scale = node.inputs[:2]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        target = node.outputs[0]
        normed = target
        position = graph.nodes.index(node)
        if bias is not None:
            normed = gs.Variable(unused_name(graph, f"{target.name}.normed"), target.dtype, target.shape)
        epsilon = node.attrs.get("epsilon", 1e-5)
        node.outputs.clear()
        node.inputs.clear()
        graph.nodes.remove(node)
        graph.nodes.insert(
            position,
            gs.Node(
                "RMSNormalization", node.name, {"axis": -1, "epsilon": epsilon}, [source, scale], [normed]
            ),
        )
        if bias is not None:
            shift = gs.Node("Add", unused_name(graph, f"{node.name}.bias"), {}, [normed, bias], [target])
            graph.nodes.insert(position + 1, shift)

    def _center(self, stream: Component) -> None:
        for absorber in stream.absorbers:
            weight = own_constant(absorber.node, absorber.input_index)
            set_weight(weight, Centered(weight_of(weight), absorber.axis))


def ones_like(name: str, scale: gs.Constant) -> gs.Constant:
    """Return a unit scale in place of one that was folded."""
    return constant(name, InMemory(np.ones(scale.shape, scale.dtype)))
