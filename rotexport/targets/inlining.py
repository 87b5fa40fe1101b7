"""Expand custom operators into standard ones, computing once what many layers would compute again.

TensorRT-RTX inlines function bodies itself, but names their quantization layers after the body alone, so a
second call of the same function fails to parse; and it repeats per layer, on every run, what depends on
tables only. Here bodies are expanded first; inside them, what follows from small constants is computed,
equal expressions are shared between all calls, products with the number 1 and choices that constants decide
disappear: a build takes time in proportion to nodes. Nodes of the model's own graph stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor
from onnx.inliner import inline_selected_functions
from onnx.reference import ReferenceEvaluator

LARGEST_TABLE: Final = 1 << 20  # elements of a constant that bodies compute with
EXPANDED: Final = ".expanded"  # ends the name of a function's copy, for calls that become their bodies

Array: TypeAlias = npt.NDArray[Any]
Key: TypeAlias = tuple[Any, ...]


def inline(model: onnx.ModelProto, folder: Path, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Return a model that computes the same without local functions, but for the nodes named in `keep`.

    `folder` holds the model's external data.
    """
    if not model.functions:
        return model
    functions = {(f.domain, f.name) for f in model.functions}
    calls = [node for node in model.graph.node if (node.domain, node.op_type) in functions]
    kept = {(node.domain, node.op_type) for node in calls if node.name in keep}
    own = {
        output
        for node in model.graph.node
        if (node.domain, node.op_type) not in functions or node.name in keep
        for output in node.output
    }
    inlined: onnx.ModelProto = inline_selected_functions(
        _apart(model, keep, kept), sorted(kept), exclude=True
    )
    sharing = _Sharing(inlined, folder, own)
    for node in list(inlined.graph.node):
        sharing.visit(node)
    used = _used(sharing.nodes, own | {value.name for value in inlined.graph.output})
    del inlined.graph.node[:]
    inlined.graph.node.extend(used)
    return inlined


def _apart(model: onnx.ModelProto, keep: Collection[str], kept: set[tuple[str, str]]) -> onnx.ModelProto:
    """Return a copy in which calls that are not kept call copies of the functions that are."""
    apart = onnx.ModelProto()
    apart.CopyFrom(model)
    copies = [f for f in model.functions if (f.domain, f.name) in kept]
    for function in copies:
        copy = apart.functions.add()
        copy.CopyFrom(function)
        copy.name += EXPANDED
    inside = (node for function in apart.functions for node in function.node)
    expanded = (node for node in apart.graph.node if node.name not in keep)
    for node in (*inside, *expanded):
        if (node.domain, node.op_type) in kept:
            node.op_type += EXPANDED
    return apart


def _used(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes, of topologically sorted ones, that tensors in `wanted` are computed by."""
    used = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            used.append(node)
            wanted |= set(_reads(node))
    return used[::-1]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what a node reads, in its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from _reads(inner)


class _Sharing:
    """One walk over topologically sorted nodes; collects those that remain."""

    def __init__(self, model: onnx.ModelProto, folder: Path, own: set[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._graph, self._folder, self._own = model.graph, folder, own
        self._opsets = list(model.opset_import)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._values: dict[str, Array | None] = {}  # of initializers and computed tensors; None: too large
        self._stored: dict[Key, str] = {}
        self._same: dict[str, str] = {}  # tensor -> its equal
        self._seen: dict[Key, list[str]] = {}
        self._makers: dict[str, onnx.NodeProto] = {}
        self._outputs = {value.name for value in model.graph.output}
        values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._shapes = {value.name: value.type.tensor_type.shape.dim for value in values}

    def visit(self, node: onnx.NodeProto) -> None:
        """Keep, share or compute one node."""
        self._rename(node)
        if set(node.output) & self._own or any(a.HasField("g") or a.graphs for a in node.attribute):
            self._keep(node)
            return
        if same := self._equal_input(node):
            self._same[node.output[0]] = same
            return
        self._multiply_rows(node)
        self._type_casts(node)
        key = (node.op_type, node.domain, *node.input, "|", *(a.SerializeToString() for a in node.attribute))
        equal = self._seen.setdefault(key, list(node.output))
        if equal != list(node.output) and not set(node.output) & self._outputs:
            self._same |= dict(zip(node.output, equal, strict=True))
        elif not self._compute(node):
            node.name = f"{node.output[0]}.{node.op_type}"
            self._keep(node)

    def _keep(self, node: onnx.NodeProto) -> None:
        for index, name in enumerate(node.input):
            node.input[index] = self._reference(name)
        self.nodes.append(node)
        self._makers |= dict.fromkeys(node.output, node)

    def _equal_input(self, node: onnx.NodeProto) -> str | None:
        """Return the input that a node passes on: the other factor of [[1]], the choice of a constant."""
        if set(node.output) & self._outputs:
            return None
        first = self._value(node.input[0]) if node.op_type in ("MatMul", "Where") else None
        if first is None or first.size != 1:
            return None
        others = [str(name) for name in node.input[1:]]
        if node.op_type == "MatMul":
            return others[0] if first.shape == (1, 1) and first.item() == 1 else None
        yes, no = others
        if first.ndim or not (self._has_shape_of(yes, no) or self._has_shape_of(no, yes)):
            return None
        return yes if first.item() else no

    def _multiply_rows(self, node: onnx.NodeProto) -> None:
        """Turn a product of rows, between two reshapes, into one of the tensor whose last axis they are."""
        product, shape = (self._makers.get(name) for name in [*node.input, "", ""][:2])
        if node.op_type != "Reshape" or product is None or product.op_type != "MatMul":
            return
        rows, table = self._makers.get(product.input[0]), self._value(product.input[1])
        if rows is None or rows.op_type != "Reshape" or shape is None or shape.op_type != "Shape":
            return
        origin, target = shape.input[0], self._value(rows.input[1])
        width = self._width(origin)
        if shape.attribute or table is None or table.shape != (width, width) or target is None:
            return
        if target[-1] == width and self._has_shape_of(rows.input[0], origin):
            node.op_type = "MatMul"
            node.input[:] = [rows.input[0], product.input[1]]
            del node.attribute[:]

    def _has_shape_of(self, name: str, origin: str) -> bool:
        """Say whether a tensor is computed from `origin` element by element, with numbers or rows alone."""
        maker = self._makers.get(name)
        if name == origin or maker is None:
            return name == origin
        if maker.op_type not in ("Cast", "CastLike", "Mul", "Div", "Tanh"):
            return False
        reads = maker.input[:1] if maker.op_type == "CastLike" else maker.input
        shapes = {read: None if (value := self._value(read)) is None else value.shape for read in reads}
        moving = [read for read, shape in shapes.items() if shape not in ((), (self._width(origin),))]
        return len(moving) == 1 and self._has_shape_of(moving[0], origin)

    def _width(self, name: str) -> int:
        """Return the last dimension of a tensor, 0 where the model does not say it."""
        dims = self._shapes.get(name)
        return dims[-1].dim_value if dims else 0

    def _rename(self, node: onnx.NodeProto) -> None:
        for index, name in enumerate(node.input):
            node.input[index] = self._same.get(name, name)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                for inner in graph.node:
                    self._rename(inner)
                    for index, name in enumerate(inner.input):
                        inner.input[index] = self._reference(name)

    def _type_casts(self, node: onnx.NodeProto) -> None:
        """Turn CastLike into Cast where the type is known, so that casts of one table are equal."""
        to = self._types.get(node.input[1], 0) if node.op_type == "CastLike" else 0
        if to:
            del node.input[1:]
            node.op_type = "Cast"
            node.attribute.append(helper.make_attribute("to", to))

    def _compute(self, node: onnx.NodeProto) -> bool:
        """Evaluate a node whose inputs are all known and small, or a shape; say whether that was so."""
        if self._read_shape(node):
            return True
        values = [self._value(name) for name in node.input]
        if any(value is None for value in values) or set(node.output) & self._outputs:
            return False
        inputs = [helper.make_tensor_value_info(name, 0, None) for name in dict.fromkeys(node.input)]
        outputs = [helper.make_tensor_value_info(name, 0, None) for name in node.output]
        graph = helper.make_graph([node], "node", inputs, outputs)
        evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=self._opsets))
        results = evaluator.run(None, dict(zip(node.input, values, strict=True)))
        self._values |= dict(zip(node.output, map(np.asarray, results), strict=True))
        return True

    def _read_shape(self, node: onnx.NodeProto) -> bool:
        """Take the shape of a tensor where the model says it; say whether it does."""
        if node.op_type != "Shape" or node.input[0] not in self._shapes or set(node.output) & self._outputs:
            return False
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        dims = list(self._shapes[node.input[0]])[attributes.get("start", 0) : attributes.get("end")]
        if not all(dim.HasField("dim_value") for dim in dims):
            return False
        self._values[node.output[0]] = np.array([dim.dim_value for dim in dims], np.int64)
        return True

    def _value(self, name: str) -> Array | None:
        if name not in self._values:
            self._values[name] = self._load(name)
        return self._values[name]

    def _load(self, name: str) -> Array | None:
        tensor = self._initializers.get(name)
        if tensor is None or np.prod(tensor.dims) > LARGEST_TABLE:
            return None
        loaded = onnx.TensorProto()
        loaded.CopyFrom(tensor)
        if loaded.data_location == onnx.TensorProto.EXTERNAL:
            load_external_data_for_tensor(loaded, str(self._folder))
        array: Array = numpy_helper.to_array(loaded)
        return array

    def _reference(self, name: str) -> str:
        """Return the name to read a tensor by, storing it first when it was computed here."""
        value = self._values.get(name)
        if value is None or name in self._initializers:
            return name
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._stored:
            self._stored[key] = name
            self._graph.initializer.append(numpy_helper.from_array(value, name))
        return self._stored[key]
