"""Which calls of our operators the plugin library's kernels take: the others run as their bodies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from rotexport.graph.functions import DOMAIN
from rotexport.plugins.judging import NodeInput, Question, judge
from rotexport.targets.profiles import Range

Types = Mapping[str, onnx.TypeProto.Tensor]


@dataclass(frozen=True)
class Refusal:
    """A node that no kernel takes, so that TensorRT runs its operator's body."""

    node: str
    operator: str
    reason: str


def split_calls(
    model: onnx.ModelProto,
    provided: Collection[str],
    library: Path,
    profiles: Sequence[Mapping[str, Range]],
) -> tuple[list[str], list[Refusal]]:
    """Return the names of the nodes that kernels take in every profile, and what was refused.

    Args:
        model: its top-level calls of our operators are asked about, by node name.
        provided: operators that the library has plugins for.
        library: the plugin library.
        profiles: (smallest, usual, largest) of each symbolic dimension, one mapping per profile.

    Raises:
        TargetError: the library cannot be asked.

    """
    calls = [n for n in model.graph.node if n.domain == DOMAIN and n.op_type in provided]
    types = _types(model)
    attributes = {f.name: list(f.attribute) for f in model.functions if f.domain == DOMAIN}
    reasons: dict[str, str] = {}
    questions: list[tuple[str, Question]] = []
    for node in calls:
        for ranges in profiles:
            try:
                question = _question(node, attributes[node.op_type], types, ranges)
            except LookupError as error:
                reasons[node.name] = str(error.args[0])
                break
            questions.append((node.name, question))
    answers = judge(library, [question for _, question in questions]) if questions else []
    for (name, _), reason in zip(questions, answers, strict=True):
        if reason is not None:
            reasons.setdefault(name, reason)
    refused = [Refusal(n.name, n.op_type, reasons[n.name]) for n in calls if n.name in reasons]
    return [node.name for node in calls if node.name not in reasons], refused


def _types(model: onnx.ModelProto) -> Types:
    types = {}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        types[value.name] = value.type.tensor_type
    for tensor in model.graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
    return types


def _question(
    node: onnx.NodeProto, attributes: Collection[str], types: Types, ranges: Mapping[str, Range]
) -> Question:
    numbers = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name in attributes}
    return Question(node.op_type, numbers, tuple(_input(name, types, ranges) for name in node.input))


def _input(name: str, types: Types, ranges: Mapping[str, Range]) -> NodeInput:
    if name not in types or not types[name].HasField("shape"):
        raise LookupError(f"the graph states no shape for '{name}'")
    extents = [_extent(name, dim, ranges) for dim in types[name].shape.dim]
    return NodeInput(types[name].elem_type, tuple(e[0] for e in extents), tuple(e[1] for e in extents))


def _extent(name: str, dim: onnx.TensorShapeProto.Dimension, ranges: Mapping[str, Range]) -> tuple[int, int]:
    """Return the smallest and largest size of an axis: a number, a name, or a sum of these."""
    if dim.HasField("dim_value"):
        return int(dim.dim_value), int(dim.dim_value)
    terms = [term.strip() for term in dim.dim_param.split("+")]
    unknown = [term for term in terms if not term.isdecimal() and term not in ranges]
    if unknown:
        raise LookupError(f"'{name}' has a dimension called '{dim.dim_param}', which no profile bounds")
    sizes = [(int(t), 0, int(t)) if t.isdecimal() else ranges[t] for t in terms]
    return sum(size[0] for size in sizes), sum(size[2] for size in sizes)
