"""The interface of a streaming graph: lengths in, positions computed, chosen logits out.

`attention_mask`, `position_ids` and the growing cache give way to `past_length` and `new_length`, from which
the positions of a call and of the tokens in a ring follow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.errors import UnsupportedModelError
from rotexport.graph.edit import consumers, drop_unused, producer, replace_reads, sort
from rotexport.graph.positions import TOKENS, Positions
from rotexport.graph.weights import Array, InMemory
from rotexport.quant.emit import INT64, Emitter

INT32 = np.dtype(np.int32)
RING_SLOTS = re.compile(r"positions\.ring_(?P<sinks>\d+)_(?P<window>\d+)\.slot")  # the constants' names


class StreamInterface:
    """Lengths in place of masks and positions; tensors as they would be at other positions."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self.flow = Positions(graph)
        if self.flow.reach(graph.tensors()["block.0.input"]):
            raise UnsupportedModelError(
                "the model adds learned positions to its embeddings: a stream would run past their table; "
                "use attention.kind: dense"
            )
        self.lengths = [gs.Variable(name, INT32, ["batch"]) for name in ("past_length", "new_length")]
        graph.inputs[1:1] = self.lengths
        ids = next(tensor for tensor in graph.inputs if tensor.name == "input_ids")
        self._rings: dict[tuple[int, int], gs.Variable] = {}
        self._limits: dict[int, gs.Variable] = {}
        self._angles: dict[tuple[object, ...], tuple[gs.Variable, gs.Variable]] = {}
        emitter = Emitter("positions")
        axes, zero, one = (
            emitter.integers("axis", [1]),
            emitter.number("zero", 0, INT64),
            emitter.number("one", 1, INT64),
        )
        length = emitter.emit("Shape", "length", [ids], [1], INT64, start=1, end=2)
        count = emitter.emit("Squeeze", "count", [length], [], INT64)
        steps = emitter.emit("Range", "steps", [zero, count, one], [TOKENS], INT64)
        past_row = emitter.cast("past", self.lengths[0], INT64)
        self._past = emitter.emit("Unsqueeze", "column", [past_row, axes], ["batch", 1], INT64)
        self.absolute = emitter.emit("Add", "absolute", [self._past, steps], ["batch", TOKENS], INT64)
        graph.nodes[0:0] = emitter.nodes

    def query_at(self, query: gs.Variable, limit: int) -> gs.Variable:
        """Return the query as computed with every position replaced by min(position, limit)."""
        if not self.flow.reach(query):
            return query
        if limit not in self._limits:
            emitter = Emitter(f"positions.within_{limit}")
            last = emitter.number("limit", limit, INT64)
            self._limits[limit] = emitter.emit(
                "Min", "clipped", [self.absolute, last], self.absolute.shape, INT64
            )
            self._graph.nodes += emitter.nodes
        return self.flow.at(query, self._limits[limit], f".within_{limit}")

    def angles(
        self, parts: Sequence[gs.Variable], constant: bool, ring: tuple[int, int], dtype: np.dtype[Any]
    ) -> tuple[gs.Variable, gs.Variable]:
        """Return `parts` [B, S, F] side by side, and a 1 behind them if `constant`: of new tokens, of all.

        `dtype` is theirs. All are those in a ring of (sinks, window), by slot, then the new ones:
        [B, S, R] and [B, window + S, R].
        """
        key = (tuple(map(id, parts)), constant, ring, dtype)
        if key not in self._angles:
            stem = f"angles.{len(self._angles)}"
            slots = self._ring(*ring)
            suffix = f".ring_{ring[0]}_{ring[1]}"
            turned = [self.flow.at(part, slots, suffix) for part in parts]
            places = {"new": (self.absolute, list(parts)), "ring": (slots, turned)}
            now, held = (
                self._side_by_side(
                    f"{stem}.{name}", [*found, self._ones(stem, name, at, dtype)] if constant else found
                )
                for name, (at, found) in places.items()
            )
            emitter = Emitter(stem)
            shape = ["batch", f"{ring[1]} + {TOKENS}", now.shape[2]]
            everything = emitter.emit("Concat", "all", [held, now], shape, dtype, axis=1)
            self._graph.nodes += emitter.nodes
            self._angles[key] = now, everything
        return self._angles[key]

    def close(self) -> None:
        """Read positions from the lengths; drop the old inputs and what only they fed."""
        old = self.flow.source
        replace_reads(old, self.absolute, consumers(old))
        drop_unused(self._graph)
        for tensor in list(self._graph.inputs):
            if tensor.name in ("attention_mask", "position_ids") or tensor.name.startswith(
                "past_key_values."
            ):
                self._graph.inputs.remove(tensor)
        sort(self._graph)

    def _ring(self, sinks: int, window: int) -> gs.Variable:
        """Return the positions [batch, window] of what ring slots hold before the call; 0 for empty ones."""
        if (sinks, window) not in self._rings:
            emitter = Emitter(f"positions.ring_{sinks}_{window}")
            shape: list[int | str | None] = ["batch", window]
            newest_slot = emitter.lazy("slot", InMemory(ring_slots(sinks, window)))
            size, one, zero = (
                emitter.number(n, v, INT64) for n, v in (("size", window), ("one", 1), ("zero", 0))
            )
            behind = emitter.emit("Sub", "behind", [self._past, newest_slot], shape, INT64)
            age = emitter.emit("Mod", "age", [behind, size], shape, INT64)
            newest = emitter.emit("Sub", "newest", [self._past, one], ["batch", 1], INT64)
            held = emitter.emit("Sub", "held", [newest, age], shape, INT64)
            self._rings[sinks, window] = emitter.emit("Max", "positions", [held, zero], shape, INT64)
            self._graph.nodes += emitter.nodes
        return self._rings[sinks, window]

    def _side_by_side(self, name: str, parts: list[gs.Variable]) -> gs.Variable:
        emitter = Emitter(name)
        shape = [*parts[0].shape[:2], sum(part.shape[2] for part in parts)]
        joined = emitter.emit("Concat", "angles", parts, shape, parts[0].dtype, axis=-1)
        self._graph.nodes += emitter.nodes
        return joined

    def _ones(self, stem: str, name: str, positions: gs.Variable, dtype: np.dtype[Any]) -> gs.Variable:
        """Return ones [B, N, 1] for positions [B, N]."""
        emitter = Emitter(f"{stem}.{name}.ones")
        last, zero, one = (
            emitter.integers("last", [-1]),
            emitter.number("zero", 0, INT64),
            emitter.number("one", 1, INT64),
        )
        shape = [*positions.shape, 1]
        column = emitter.emit("Unsqueeze", "column", [positions, last], shape, INT64)
        nothing = emitter.emit("Mul", "nothing", [column, zero], shape, INT64)
        ones = emitter.cast("typed", emitter.emit("Add", "whole", [nothing, one], shape, INT64), dtype)
        self._graph.nodes += emitter.nodes
        return ones


def ring_slots(sinks: int, window: int) -> Array:
    """Return how many tokens a stream has when a ring's slots [window] are first written."""
    return np.arange(window) + sinks + 1


def choose_logits(graph: gs.Graph) -> None:
    """Compute logits only at the positions `logit_index` [batch, logit_count] of the call.

    The last block's output is gathered before the final norm and head: all logits of a long prompt would be
    gigabytes.
    """
    numbers = [int(name.split(".")[1]) for name in graph.tensors() if _is_block_output(name)]
    stream = graph.tensors()[f"block.{max(numbers)}.output"]
    index = gs.Variable("logit_index", INT64, ["batch", "logit_count"])
    graph.inputs.insert(1, index)
    emitter = Emitter("logits")
    last = emitter.integers("last", [-1])
    places = emitter.emit("Unsqueeze", "places", [index, last], ["batch", "logit_count", 1], INT64)
    readers = consumers(stream)
    shape = ["batch", "logit_count", stream.shape[2]]
    chosen = emitter.emit("GatherND", "chosen", [stream, places], shape, np.dtype(stream.dtype), batch_dims=1)
    place = graph.nodes.index(producer(stream)) + 1
    graph.nodes[place:place] = emitter.nodes
    replace_reads(stream, chosen, readers)
    for tensor in _downstream(chosen):
        if tensor.shape is not None:
            tensor.shape = ["logit_count" if dim == "sequence" else dim for dim in tensor.shape]


def _is_block_output(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[0] == "block" and parts[1].isdigit() and parts[2] == "output"


def _downstream(tensor: gs.Variable) -> list[gs.Variable]:
    found, todo = [], [tensor]
    while todo:
        for node in consumers(todo.pop()):
            found += node.outputs
            todo += node.outputs
    return found
