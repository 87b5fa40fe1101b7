"""Which bases a model's activations may be expressed in: a dataflow analysis.

Every (tensor, axis) of the float graph has a *basis*: an invertible matrix T such that the tensor holds
x T instead of x. Each operator relates the bases of its edges (a residual sum forces three of them to be
equal, a constant MatMul leaves both of its own free because the matrix absorbs them, a nonlinearity forces
the identity). Solving the relations by union-find gives *components*: axes that must share one basis. A
component without pins is free, and any T of its class can be folded into the weights that absorb it. Pins
are the places where the basis must be the identity; a transform put online there frees the rest.

A reshape that splits an axis F into (H, D) joins F to D: F then carries I_H (x) T, block-diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.graph.edit import producer
from rotexport.graph.sites import is_linear, static_size
from rotexport.graph.weights import weight_of

Tensor: TypeAlias = "gs.Variable | gs.Constant"


class Atom(NamedTuple):
    """One axis (non-negative) of one tensor."""

    tensor: str
    axis: int


@dataclass(frozen=True)
class Pin:
    """A place where a basis must be the identity, because of `node` (None: a graph input or output)."""

    atom: Atom
    node: gs.Node | None
    writes: bool  # the node writes the tensor (else it reads it)
    reason: str

    def __str__(self) -> str:
        return f"{self.atom.tensor} ({self.reason})"


class Absorber(NamedTuple):
    """A constant axis that takes the basis up: `apply` T for producers, T^-T for consumers."""

    node: gs.Node
    input_index: int
    axis: int
    consumes: bool


@dataclass
class Component:
    """Axes that share one basis, of size `size` (larger atoms carry it block-diagonally)."""

    size: int
    atoms: list[Atom] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    absorbers: list[Absorber] = field(default_factory=list)
    orthogonal_only: bool = False
    residual_sums: int = 0

    @property
    def free(self) -> bool:
        """Whether a transform can be folded without anything online."""
        return not self.pins

    def __contains__(self, atom: Atom) -> bool:
        return atom in self._atoms

    @property
    def _atoms(self) -> frozenset[Atom]:
        return frozenset(self.atoms)


@dataclass
class Bases:
    """The solved analysis of one graph."""

    components: list[Component]
    index: dict[Atom, int]

    def at(self, tensor: Tensor, axis: int = -1) -> Component | None:
        """Return the component of a tensor's axis, if the axis is analysed."""
        number = self.index.get(_atom(tensor, axis))
        return None if number is None else self.components[number]


def analyse(graph: gs.Graph) -> Bases:
    """Solve the bases of a canonical (topologically sorted) graph.

    Cache inputs and outputs (`past_key_values.*`, `present.*`) are not pinned: what they hold is this
    graph's own affair. All other graph inputs and outputs are.
    """
    solver = _Solver()
    for node in graph.nodes:
        if _is_float(node):
            _RULES.get(node.op, _pin_all)(solver, node)
    for tensor in graph.outputs:
        if not tensor.name.startswith("present."):
            solver.pin(tensor, None, False, "graph output")
    for tensor in graph.inputs:
        if (
            not tensor.name.startswith("past_key_values.")
            and tensor.dtype is not None
            and _is_float_type(tensor)
        ):
            solver.pin(tensor, None, True, "graph input")
    return solver.solve()


class _Solver:
    """Union-find over atoms, collecting what each component needs to know."""

    def __init__(self) -> None:
        self._parent: dict[Atom, Atom] = {}
        self._size: dict[Atom, int] = {}
        self._pins: list[Pin] = []
        self._absorbers: list[tuple[Atom, Absorber]] = []
        self._orthogonal: list[Atom] = []
        self._sums: list[Atom] = []

    def add(self, tensor: Tensor, axis: int = -1) -> Atom:
        atom = _atom(tensor, axis)
        if atom not in self._parent:
            self._parent[atom] = atom
            self._size[atom] = static_size(tensor, axis) or 0
        return atom

    def join(self, a: Atom, b: Atom) -> None:
        a, b = self._find(a), self._find(b)
        if a != b:
            self._parent[b] = a
            self._size[a] = int(np.gcd(self._size[a], self._size[b]))

    def pin(self, tensor: Tensor, node: gs.Node | None, writes: bool, reason: str) -> None:
        """Pin the last axis of a tensor."""
        if not isinstance(tensor, gs.Constant) and tensor.shape:
            self._pins.append(Pin(self.add(tensor), node, writes, reason))

    def absorb(self, atom: Atom, absorber: Absorber) -> None:
        self._absorbers.append((atom, absorber))

    def require_orthogonal(self, atom: Atom) -> None:
        self._orthogonal.append(atom)

    def count_sum(self, atom: Atom) -> None:
        self._sums.append(atom)

    def _find(self, atom: Atom) -> Atom:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def solve(self) -> Bases:
        index: dict[Atom, int] = {}
        components: dict[Atom, Component] = {}
        for atom in self._parent:
            root = self._find(atom)
            components.setdefault(root, Component(self._size[root])).atoms.append(atom)
        for pin in self._pins:
            components[self._find(pin.atom)].pins.append(pin)
        for atom, absorber in self._absorbers:
            components[self._find(atom)].absorbers.append(absorber)
        for atom in self._orthogonal:
            components[self._find(atom)].orthogonal_only = True
        for atom in self._sums:
            components[self._find(atom)].residual_sums += 1
        for number, component in enumerate(components.values()):
            index.update(dict.fromkeys(component.atoms, number))
        return Bases(list(components.values()), index)


def _atom(tensor: Tensor, axis: int) -> Atom:
    return Atom(tensor.name, axis % len(tensor.shape))


def _is_float_type(tensor: Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).name in (
        "float32",
        "float16",
        "bfloat16",
        "float64",
    )


def _is_float(node: gs.Node) -> bool:
    return any(_is_float_type(tensor) for tensor in node.outputs)


def _activations(node: gs.Node) -> list[gs.Variable]:
    return [t for t in node.inputs if isinstance(t, gs.Variable) and t.name and _is_float_type(t) and t.shape]


# Relations, one function per kind of operator.


def _pin_all(solver: _Solver, node: gs.Node) -> None:
    reason = f"{node.op} '{node.name}'"
    for tensor in _activations(node):
        solver.pin(tensor, node, False, reason)
    for tensor in node.outputs:
        if _is_float_type(tensor):
            solver.pin(tensor, node, True, reason)


def _matmul(solver: _Solver, node: gs.Node) -> None:
    if not is_linear(node):
        _pin_all(solver, node)
        return
    solver.absorb(solver.add(node.inputs[0]), Absorber(node, 1, 0, consumes=True))
    solver.absorb(solver.add(node.outputs[0]), Absorber(node, 1, 1, consumes=False))


def _gather(solver: _Solver, node: gs.Node) -> None:
    table = node.inputs[0]
    if isinstance(table, gs.Constant) and len(table.shape) == 2 and node.attrs.get("axis", 0) == 0:
        solver.absorb(solver.add(node.outputs[0]), Absorber(node, 0, 1, consumes=False))
    elif (
        isinstance(table, gs.Variable)
        and node.attrs.get("axis", 0) % len(table.shape) != len(table.shape) - 1
    ):
        _carry(solver, node)
    else:
        _pin_all(solver, node)


def _add(solver: _Solver, node: gs.Node) -> None:
    constants = [i for i, tensor in enumerate(node.inputs) if isinstance(tensor, gs.Constant)]
    out = solver.add(node.outputs[0])
    width = static_size(node.outputs[0], -1)
    if not constants:
        if any(static_size(tensor, -1) != width for tensor in node.inputs):
            _pin_all(solver, node)  # a broadcast along features
            return
        for tensor in node.inputs:
            solver.join(out, solver.add(tensor))
        solver.count_sum(out)
        return
    bias = node.inputs[constants[0]]
    if not bias.shape or bias.shape[-1] != width:
        _pin_all(solver, node)  # one number for all features: only the identity leaves it so
        return
    solver.join(out, solver.add(node.inputs[1 - constants[0]]))
    solver.absorb(out, Absorber(node, constants[0], len(bias.shape) - 1, consumes=False))


def _mul(solver: _Solver, node: gs.Node) -> None:
    scalars = [t for t in node.inputs if not t.shape or all(size == 1 for size in t.shape)]
    others = [t for t in node.inputs if not any(t is scalar for scalar in scalars)]
    if len(scalars) == 1 and len(others) == 1 and node.outputs[0].shape:
        solver.join(solver.add(node.outputs[0]), solver.add(others[0]))
    else:
        _pin_all(solver, node)


def _div(solver: _Solver, node: gs.Node) -> None:
    if node.inputs[1].shape and not all(size == 1 for size in node.inputs[1].shape):
        _pin_all(solver, node)
    else:
        solver.join(solver.add(node.outputs[0]), solver.add(node.inputs[0]))


def _carry(solver: _Solver, node: gs.Node) -> None:
    """Join the last axes of the data input and of the output."""
    source, target = node.inputs[0], node.outputs[0]
    if not source.shape or not target.shape or static_size(source, -1) != static_size(target, -1):
        _pin_all(solver, node)
    else:
        solver.join(solver.add(target), solver.add(source))


def _norm(solver: _Solver, node: gs.Node) -> None:
    source, scale, target = node.inputs[0], node.inputs[1], node.outputs[0]
    last = node.attrs.get("axis", -1) in (-1, len(source.shape) - 1)
    if last and is_ones(scale):
        solver.join(solver.add(target), solver.add(source))
        solver.require_orthogonal(solver.add(target))
    else:
        _pin_all(solver, node)


def is_ones(tensor: Tensor) -> bool:
    """Whether a constant is known to be all ones (reads one vector)."""
    return isinstance(tensor, gs.Constant) and bool(np.all(weight_of(tensor).read() == 1))


def _attention(solver: _Solver, node: gs.Node) -> None:
    query, key, value = node.inputs[:3]
    out = node.outputs[0]
    if len(query.shape) != 4:
        _pin_all(solver, node)
        return
    solver.join(solver.add(query), solver.add(key))
    solver.require_orthogonal(solver.add(query))
    solver.join(solver.add(out), solver.add(value))


def _concat(solver: _Solver, node: gs.Node) -> None:
    rank = len(node.outputs[0].shape)
    if node.attrs["axis"] % rank == rank - 1 or any(isinstance(t, gs.Constant) for t in node.inputs):
        _pin_all(solver, node)
        return
    for tensor in node.inputs:
        solver.join(solver.add(node.outputs[0]), solver.add(tensor))


def _transpose(solver: _Solver, node: gs.Node) -> None:
    permutation = node.attrs.get("perm")
    source, target = node.inputs[0], node.outputs[0]
    if isinstance(source, gs.Constant) or not permutation or permutation[-1] != len(permutation) - 1:
        _pin_all(solver, node)
    else:
        solver.join(solver.add(target), solver.add(source))


def _reshape(solver: _Solver, node: gs.Node) -> None:
    """Carry a basis through a split or a merge of trailing axes: the smaller axis is the block."""
    source, target = node.inputs[0], node.outputs[0]
    if isinstance(source, gs.Constant) or not source.shape or not target.shape:
        _pin_all(solver, node)
        return
    before, after = static_size(source, -1), static_size(target, -1)
    if before and after and (before % after == 0 or after % before == 0):
        solver.join(solver.add(target), solver.add(source))
    else:
        _pin_all(solver, node)


_RULES: dict[str, Callable[[_Solver, gs.Node], None]] = {
    "MatMul": _matmul,
    "Gather": _gather,
    "Add": _add,
    "Mul": _mul,
    "Div": _div,
    "Cast": _carry,
    "Identity": _carry,
    "Expand": _carry,
    "RMSNormalization": _norm,
    "Attention": _attention,
    "Concat": _concat,
    "Transpose": _transpose,
    "Reshape": _reshape,
}


def residual(bases: Bases) -> Component | None:
    """Return the residual stream: the component with the most sums of two activations."""
    sums = [component for component in bases.components if component.residual_sums]
    return max(sums, key=lambda component: component.residual_sums, default=None)


def attention_nodes(graph: gs.Graph) -> Iterator[tuple[int, gs.Node]]:
    """Number the attention nodes in graph order: block 0 first."""
    yield from enumerate(node for node in graph.nodes if node.op == "Attention")


def new_key(attention: gs.Node) -> gs.Variable:
    """Return the keys an attention adds to its cache: what is concatenated after the past."""
    key = attention.inputs[1]
    writer = producer(key)
    return writer.inputs[-1] if writer is not None and writer.op == "Concat" else key
