"""Where token positions go in a graph before attention mixes tokens, and graphs at other positions."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from rotexport.graph.edit import producer

MIXERS = ("Attention", "SinkWindowAttention", "HeavyHitterAttention", "SnapAttention")
TOKENS = "sequence"  # the symbolic dimension of a call's tokens


class Positions:
    """The input `position_ids` of a canonical graph and what is computed from it."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self.source = next(tensor for tensor in graph.inputs if tensor.name == "position_ids")
        self._reached: dict[int, bool] = {}
        self._copies: dict[str, dict[int, gs.Variable]] = {}

    def reach(self, tensor: gs.Variable | gs.Constant) -> bool:
        """Tell whether positions reach a tensor otherwise than through an earlier layer's attention."""
        if id(tensor) not in self._reached:
            writer = producer(tensor)
            if writer is None or writer.op.startswith(MIXERS):
                self._reached[id(tensor)] = tensor is self.source
            else:
                self._reached[id(tensor)] = any(self.reach(source) for source in writer.inputs)
        return self._reached[id(tensor)]

    def are_all_of(self, tensor: gs.Variable | gs.Constant) -> bool:
        """Tell whether a tensor follows from positions and constants alone."""
        writer = producer(tensor)
        if writer is None or not self.reach(tensor):
            return tensor is self.source or isinstance(tensor, gs.Constant)
        return all(self.are_all_of(source) for source in writer.inputs)

    def at(self, tensor: gs.Variable, positions: gs.Variable, suffix: str) -> gs.Variable:
        """Return `tensor` as computed with `positions` [batch, N] in place of `position_ids`.

        What lies between is copied, once for all tensors asked for with one suffix.
        """
        copies = self._copies.setdefault(suffix, {id(self.source): positions})
        return self._copy(tensor, copies, suffix, positions.shape[1])

    def _copy(
        self, tensor: gs.Variable, copies: dict[int, gs.Variable], suffix: str, tokens: int | str
    ) -> gs.Variable:
        if not self.reach(tensor):
            return tensor
        if id(tensor) not in copies:
            node: gs.Node = producer(tensor)
            inputs = [self._copy(source, copies, suffix, tokens) for source in node.inputs]
            outputs = [gs.Variable(f"{t.name}{suffix}", t.dtype, _sized(t, tokens)) for t in node.outputs]
            twin = gs.Node(
                node.op, f"{node.name}{suffix}", dict(node.attrs), inputs, outputs, domain=node.domain
            )
            self._graph.nodes.insert(self._graph.nodes.index(node) + 1, twin)
            copies.update((id(old), new) for old, new in zip(node.outputs, outputs, strict=True))
        return copies[id(tensor)]

    def moving(self, tensor: gs.Variable) -> Iterator[gs.Variable | gs.Constant]:
        """Yield what makes `tensor` move: inputs of its position-dependent part, each once.

        They are tensors that positions do not reach, and those that follow from positions alone.
        """
        seen: set[int] = set()
        todo: list[gs.Variable | gs.Constant] = [tensor]
        while todo:
            current = todo.pop()
            if id(current) in seen:
                continue
            seen.add(id(current))
            writer = producer(current)
            if writer is None or not self.reach(current) or self.are_all_of(current):
                yield current
            else:
                todo += reversed(writer.inputs)


def _sized(tensor: gs.Variable, tokens: int | str) -> list[int | str] | None:
    return None if tensor.shape is None else [tokens if dim == TOKENS else dim for dim in tensor.shape]
