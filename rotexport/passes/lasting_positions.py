"""Rotary angles that stay right in long streams.

Position times frequency in float32 is off by 1e-7 of itself: by 1 radian at ten million. A position p splits
into p = L high + low, and cos and sin of (L high) f and low f come from two small tables, computed in float64
and read by Gather:

    cos(a + b) = cos a cos b - sin a sin b        sin(a + b) = sin a cos b + cos a sin b

Preserves the function where float32 was still right; angles are exact to 1e-7 up to `LAST_POSITION`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.graph.edit import consumers, drop_unused, producer, sort
from rotexport.graph.weights import Array, InMemory, constant, weight_of
from rotexport.passes.base import Pass, PassReport, Preserves, rounding
from rotexport.quant.emit import INT64, Emitter

STEP: Final = 4096  # L: positions in the low table
STEPS: Final = 4096  # entries of the high table
LAST_POSITION: Final = STEP * STEPS - 1
SHAPING: Final = ("Unsqueeze", "Reshape", "Cast")


class LastingPositions(Pass):
    """Replace Cos and Sin of integer position times constant frequency by table look-ups."""

    name = "lasting-positions"
    preserves = Preserves.ROUNDING

    def __init__(self, step: int = STEP, steps: int = STEPS) -> None:
        """Take the number of positions in the low table, and of entries in the high one."""
        self._step, self._steps = step, steps

    def run(self, graph: gs.Graph) -> PassReport:
        self.preserves = rounding(graph)
        report = PassReport()
        tables: dict[bytes, _Tables] = {}
        for node in [node for node in graph.nodes if node.op == "Mul"]:
            angle = _angle(node)
            if angle is None:
                continue
            key = angle.frequencies.tobytes()
            if key not in tables:
                tables[key] = _Tables.of(
                    angle.frequencies, f"positions.{len(tables)}", self._step, self._steps
                )
            _look_up(graph, node, angle, tables[key])
            report.changed += 1
        drop_unused(graph)
        sort(graph)
        return report


@dataclass(frozen=True)
class _Angle:
    positions: gs.Variable  # int64, any shape
    frequencies: Array  # [F]


@dataclass(frozen=True)
class _Tables:
    """Cos and sin of low * f and (step high) * f, [step, F] and [steps, F]."""

    step: int
    cos_low: gs.Constant
    sin_low: gs.Constant
    cos_high: gs.Constant
    sin_high: gs.Constant

    @classmethod
    def of(cls, frequencies: Array, stem: str, step: int, steps: int) -> _Tables:
        exact = frequencies.astype(np.float64)
        low, high = (np.arange(n)[:, None] * exact for n in (step, steps))
        made = {
            "cos_low": np.cos(low),
            "sin_low": np.sin(low),
            "cos_high": np.cos(high * step),
            "sin_high": np.sin(high * step),
        }
        return cls(
            step, **{n: constant(f"{stem}.{n}", InMemory(t.astype(np.float32))) for n, t in made.items()}
        )


def _angle(node: gs.Node) -> _Angle | None:
    """Read position * frequency [F], the position [..., 1], if only Cos and Sin use the product."""
    readers = consumers(node.outputs[0])
    if not readers or any(reader.op not in ("Cos", "Sin") for reader in readers):
        return None
    factors = [tensor for tensor in node.inputs if isinstance(tensor, gs.Variable)]
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    if len(factors) != 1 or factors[0].shape is None or factors[0].shape[-1] != 1:
        return None
    frequencies = weight_of(constants[0]).read()
    if frequencies.size != frequencies.shape[-1]:
        return None
    tensor = factors[0]
    while tensor.dtype != INT64:
        writer = producer(tensor)
        if writer is None or writer.op not in SHAPING:
            return None
        tensor = writer.inputs[0]
    return _Angle(tensor, frequencies.reshape(-1)) if _same_but_last(tensor, factors[0]) else None


def _same_but_last(positions: gs.Variable, factor: gs.Variable) -> bool:
    """Tell whether `factor` is `positions` with a trailing 1, so that Gather gives the product's shape."""
    shape = list(positions.shape)
    return shape == list(factor.shape[:-1]) or shape == list(factor.shape)


def _look_up(graph: gs.Graph, node: gs.Node, angle: _Angle, tables: _Tables) -> None:
    product = node.outputs[0]
    emitter = Emitter(f"{product.name}.lasting")
    positions = angle.positions
    if list(positions.shape) == [*product.shape[:-1], 1]:
        axes = emitter.integers("last", [-1])
        positions = emitter.emit("Squeeze", "rows", [positions, axes], positions.shape[:-1], INT64)
    step = emitter.number("step", tables.step, INT64)
    high = emitter.emit("Div", "high", [positions, step], positions.shape, INT64)
    low = emitter.emit("Mod", "low", [positions, step], positions.shape, INT64)

    def entry(name: str, index: gs.Variable) -> gs.Variable:
        return emitter.emit("Gather", name, [getattr(tables, name), index], product.shape, axis=0)

    def product_of(label: str, a: gs.Variable, b: gs.Variable) -> gs.Variable:
        return emitter.emit("Mul", label, [a, b], product.shape)

    cos_low, sin_low = entry("cos_low", low), entry("sin_low", low)
    cos_high, sin_high = entry("cos_high", high), entry("sin_high", high)
    parts = {
        "Cos": ("Sub", product_of("cc", cos_high, cos_low), product_of("ss", sin_high, sin_low)),
        "Sin": ("Add", product_of("sc", sin_high, cos_low), product_of("cs", cos_high, sin_low)),
    }
    for number, reader in enumerate(consumers(product)):
        join, *terms = parts[reader.op]
        result = reader.outputs[0]  # keeps its name: it may be a graph output
        reader.outputs.clear()
        emitter.nodes.append(
            gs.Node(join, f"{emitter.stem}.{reader.op.lower()}.{number}", {}, terms, [result])
        )
    place = graph.nodes.index(node)
    graph.nodes[place:place] = emitter.nodes
