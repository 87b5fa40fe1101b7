"""Putting one component of the basis analysis into another basis: what the rotation passes share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_graphsurgeon as gs

from rotexport.errors import GraphError
from rotexport.graph.basis import Component, Pin
from rotexport.graph.edit import consumers, producer, replace_reads, unused_name
from rotexport.graph.weights import Folded, constant, set_weight, weight_of
from rotexport.transforms.transform import Identity, Transform


class RotationSource(Protocol):
    """Says how to rotate an axis of `size`; one that every layer has for itself is told which."""

    def transform(self, size: int, layer: int | None = None) -> Transform:
        """Return the transform."""


@dataclass(frozen=True)
class Given:
    """Matrices known by number: by layer, or under None for what all layers share."""

    transforms: Mapping[int | None, Transform]

    def transform(self, size: int, layer: int | None = None) -> Transform:
        """Return the transform given for a layer; the identity where there is none."""
        return self.transforms.get(layer, Identity(size))


def change_basis(graph: gs.Graph, component: Component, transform: Transform) -> int:
    """Let every axis of `component` hold x T instead of x; return how many online transforms that took.

    Weights absorb T where they can. Where a node pins what it writes, T follows it online; where a node
    pins what it reads, T^-1 precedes it. The function of the graph stays the same.

    Raises:
        GraphError: the component is pinned by a graph input or output, or T is not orthogonal where a norm
            or a query-key product needs it.

    """
    if component.orthogonal_only and not transform.orthogonal:
        raise GraphError(
            "a component that passes through a norm or a query-key product takes orthogonal maps only"
        )
    outside = next((pin for pin in component.pins if pin.node is None), None)
    if outside is not None:
        raise GraphError(f"the basis of {outside} is fixed by the graph's interface")
    for absorber in component.absorbers:
        weight = own_constant(absorber.node, absorber.input_index)
        lifted = transform.lifted(weight.shape[absorber.axis])
        if absorber.consumes:
            lifted = lifted.contragredient()
        set_weight(weight, Folded(weight_of(weight), lifted, absorber.axis))
    return _insert_online(graph, component.pins, transform)


def own_constant(node: gs.Node, index: int) -> gs.Constant:
    """Return a node's constant input, cloned first when other nodes read it too."""
    tensor = node.inputs[index]
    if len(consumers(tensor)) > 1:
        tensor = constant(f"{tensor.name}.{node.name}", weight_of(tensor))
        node.inputs[index] = tensor
    return tensor


def _insert_online(graph: gs.Graph, pins: list[Pin], transform: Transform) -> int:
    written = {pin.atom.tensor: pin for pin in pins if pin.writes}
    read: dict[str, list[gs.Node]] = {}
    for pin in pins:
        if not pin.writes and pin.node is not None:
            read.setdefault(pin.atom.tensor, []).append(pin.node)
    inserted = 0
    tensors = graph.tensors()
    for name in written:
        tensor = tensors[name]
        pinned_too = {id(node) for node in read.pop(name, [])}
        readers = [node for node in consumers(tensor) if id(node) not in pinned_too]
        if readers:
            insert_online(graph, tensor, transform.lifted(int(tensor.shape[-1])), readers)
            inserted += 1
    for name, nodes in read.items():
        tensor = tensors[name]
        insert_online(graph, tensor, transform.inverse().lifted(int(tensor.shape[-1])), nodes)
        inserted += 1
    return inserted


def insert_online(graph: gs.Graph, tensor: gs.Variable, transform: Transform, readers: list[gs.Node]) -> None:
    """Make `readers` read `tensor` times the transform, computed right behind the tensor's producer."""
    writer = producer(tensor)
    if writer is None:
        raise GraphError(f"'{tensor.name}' is a graph input: nothing can be inserted behind its producer")
    nodes, result = transform.online_nodes(unused_name(graph, f"{tensor.name}.rotated"), tensor)
    replace_reads(tensor, result, readers)
    position = graph.nodes.index(writer) + 1
    graph.nodes[position:position] = nodes
