"""Linear layers, found by dataflow: which constant MatMul feeds which part of which block.

Names of modules and nodes play no part. A linear is a query, key or value projection because an
`Attention` node reads its output there; it is a down projection because its output enters the residual
sum; and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.errors import GraphError
from rotexport.graph.edit import consumers, producer

NONLINEARITIES = frozenset(
    {"Sigmoid", "Gelu", "Relu", "Tanh", "Swish", "Silu", "Erf", "HardSwish", "Mish", "Elu"}
)


@dataclass(frozen=True)
class Linear:
    """A MatMul by a constant [K, N]: `name` is `block.role`, or `head`."""

    name: str
    node: gs.Node
    block: int | None
    role: str

    @property
    def weight(self) -> gs.Constant:
        """The matrix [K, N]."""
        return self.node.inputs[1]

    @property
    def input(self) -> gs.Variable:
        """The activation [..., K]."""
        return self.node.inputs[0]


def is_linear(node: gs.Node) -> bool:
    """Whether a node multiplies an activation by a constant matrix."""
    return (
        node.op == "MatMul"
        and isinstance(node.inputs[1], gs.Constant)
        and not isinstance(node.inputs[0], gs.Constant)
        and len(node.inputs[1].shape) == 2
    )


def linears(graph: gs.Graph) -> list[Linear]:
    """Return every linear of a topologically sorted graph with its role, in graph order."""
    following = _following_attention(graph)
    roles: dict[int, tuple[int | None, str]] = {}
    for number, node in enumerate(n for n in graph.nodes if n.op == "Attention"):
        _name_attention(node, number, roles)
    logits = {id(tensor) for tensor in graph.outputs if tensor.name == "logits"}
    for node in filter(is_linear, graph.nodes):
        if id(node) not in roles:
            roles[id(node)] = _name_other(graph.nodes, node, following[id(node)], logits)
    result = []
    seen: dict[str, int] = {}
    for node in filter(is_linear, graph.nodes):
        block, role = roles[id(node)]
        stem = role if block is None else f"{block}.{role}"
        seen[stem] = seen.get(stem, 0) + 1
        name = stem if seen[stem] == 1 else f"{stem}.{seen[stem]}"
        result.append(Linear(name, node, block, role))
    return result


def output_head(graph: gs.Graph) -> Linear:
    """Return the linear that makes the logits.

    Raises:
        GraphError: no product by a constant matrix does.

    """
    for linear in linears(graph):
        if linear.role == "head":
            return linear
    raise GraphError("no product by a constant matrix makes 'logits', so there is no head to correct")


def _following_attention(graph: gs.Graph) -> dict[int, int]:
    """Return, for every node, the number of the first Attention its outputs reach (or how many there are).

    Also where attention and MLP of a block run in parallel, both reach the attention of the next block first.
    """
    attentions = [node for node in graph.nodes if node.op == "Attention"]
    number = {id(node): index for index, node in enumerate(attentions)}
    following: dict[int, int] = {}
    for node in reversed(graph.nodes):
        readers = [reader for tensor in node.outputs for reader in tensor.outputs]
        following[id(node)] = min(
            (number.get(id(reader), following[id(reader)]) for reader in readers), default=len(attentions)
        )
    return following


def _name_attention(node: gs.Node, block: int, roles: dict[int, tuple[int | None, str]]) -> None:
    reached: dict[int, list[str]] = {}
    for tensor, role in zip(node.inputs[:3], ("query", "key", "value"), strict=True):
        for linear in _nearest(tensor, lambda t: [] if producer(t) is None else [producer(t)], _inputs):
            reached.setdefault(id(linear), []).append(role)
    for key, names in reached.items():
        roles[key] = (block, names[0] if len(names) == 1 else "qkv")
    for linear in _nearest(node.outputs[0], consumers, _outputs):
        roles[id(linear)] = (block, "output")


def _name_other(
    nodes: list[gs.Node], node: gs.Node, following: int, logits: set[int]
) -> tuple[int | None, str]:
    ends = _forward_ends(nodes, node, logits)
    if "logits" in ends:
        return None, "head"
    block = following - 1 if following > 0 else None
    if "add" in ends:
        return block, "down"
    if "nonlinearity" in ends:
        return block, "gate" if "product" in ends else "up"
    return block, "up" if "product" in ends else "other"


def _forward_ends(nodes: list[gs.Node], linear: gs.Node, logits: set[int]) -> set[str]:
    """Say what a linear's output runs into before the next linear.

    "product" and "add" mean an operation with an activation that does not derive from this linear alone.
    """
    ends: set[str] = set()
    derived = {id(tensor) for tensor in linear.outputs}
    for node in nodes[nodes.index(linear) + 1 :]:
        if is_linear(node) or not any(id(tensor) in derived for tensor in node.inputs):
            continue
        foreign = [t for t in node.inputs if isinstance(t, gs.Variable) and id(t) not in derived]
        if node.op in ("Mul", "Add") and foreign:
            ends.add("product" if node.op == "Mul" else "add")
            continue
        if node.op in NONLINEARITIES:
            ends.add("nonlinearity")
        derived |= {id(tensor) for tensor in node.outputs}
    if derived & logits:
        ends.add("logits")
    return ends


def _inputs(node: gs.Node) -> list[gs.Variable]:
    return [tensor for tensor in node.inputs if isinstance(tensor, gs.Variable)]


def _outputs(node: gs.Node) -> list[gs.Variable]:
    return list(node.outputs)


def _nearest(
    start: gs.Variable,
    neighbours: Callable[[gs.Variable], Iterable[gs.Node]],
    onward: Callable[[gs.Node], list[gs.Variable]],
) -> list[gs.Node]:
    """Return the linears first met when walking from a tensor, without walking through them."""
    found: dict[int, gs.Node] = {}
    seen = {id(start)}
    todo = [start]
    while todo:
        for node in neighbours(todo.pop()):
            if is_linear(node):
                found[id(node)] = node
                continue
            for tensor in onward(node):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    todo.append(tensor)
    return list(found.values())


def static_size(tensor: gs.Variable | gs.Constant, axis: int) -> int | None:
    """Return a dimension when it is known at compile time."""
    if tensor.shape is None:
        return None
    size = tensor.shape[axis]
    return int(size) if isinstance(size, (int, np.integer)) else None
