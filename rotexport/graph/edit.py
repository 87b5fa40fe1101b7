"""Small edits that passes share, on graphsurgeon graphs."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from rotexport.errors import GraphError


def consumers(tensor: gs.Variable | gs.Constant) -> list[gs.Node]:
    """Return the nodes that read a tensor, each once, in order."""
    return list({id(node): node for node in tensor.outputs}.values())


def producer(tensor: gs.Variable | gs.Constant) -> gs.Node | None:
    """Return the node that writes a tensor, or None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def replace_reads(
    old: gs.Variable | gs.Constant, new: gs.Variable | gs.Constant, nodes: Iterable[gs.Node]
) -> None:
    """Make `nodes` read `new` wherever they read `old`."""
    for node in nodes:
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def unused_name(graph: gs.Graph, stem: str) -> str:
    """Return `stem`, or `stem.2`, `stem.3`, … when a tensor or node already has the name."""
    taken = set(graph.tensors()) | {node.name for node in graph.nodes}
    if stem not in taken:
        return stem
    return next(name for n in range(2, len(taken) + 3) if (name := f"{stem}.{n}") not in taken)


def sort(graph: gs.Graph) -> None:
    """Order nodes topologically, keeping the present order where it is already right.

    graphsurgeon's own sort recurses as deep as the graph is long.
    """
    waiting = {id(node): sum(1 for tensor in node.inputs if tensor.inputs) for node in graph.nodes}
    ready = [node for node in reversed(graph.nodes) if waiting[id(node)] == 0]
    place = {id(node): index for index, node in enumerate(graph.nodes)}
    ordered: list[gs.Node] = []
    while ready:
        node = ready.pop()
        ordered.append(node)
        freed = []
        for tensor in node.outputs:
            for reader in tensor.outputs:
                if id(reader) not in waiting:
                    raise GraphError(f"node '{reader.name}' reads '{tensor.name}' but is not in the graph")
                waiting[id(reader)] -= 1
                if waiting[id(reader)] == 0:
                    freed.append(reader)
        ready.extend(sorted(freed, key=lambda n: place[id(n)], reverse=True))
    if len(ordered) != len(graph.nodes):
        stuck = next(node for node in graph.nodes if waiting[id(node)] > 0)
        raise GraphError(f"the graph has a cycle through node '{stuck.name}'")
    graph.nodes[:] = ordered


def drop_unused(graph: gs.Graph) -> int:
    """Remove nodes none of whose outputs anybody reads; return how many went."""
    outputs = {id(tensor) for tensor in graph.outputs}
    removed = 0
    for node in reversed(list(graph.nodes)):
        if any(tensor.outputs or id(tensor) in outputs for tensor in node.outputs):
            continue
        node.inputs.clear()
        node.outputs.clear()
        graph.nodes.remove(node)
        removed += 1
    return removed
