"""The ONNX bodies of the custom operators: text files, one per operator, found by the operator's name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Final

import onnx
import onnx.parser
import onnx_graphsurgeon as gs

from rotexport.errors import GraphError

DOMAIN: Final = "rotexport"
_FOLDER: Final = files("rotexport") / "graphs"


@cache
def load_function(name: str) -> onnx.FunctionProto:
    """Return the body of the operator `name` of domain `rotexport`.

    Raises:
        GraphError: there is no such operator, or its text does not define it.

    """
    file = _FOLDER / f"{name}.onnxtxt"
    if not name.isidentifier() or not file.is_file():
        raise GraphError(
            f"operator '{name}' of domain '{DOMAIN}' has no body: '{name}.onnxtxt' is not among its graphs"
        )
    try:
        function = onnx.parser.parse_function(file.read_text("utf-8"))
    except onnx.parser.ParseError as error:
        raise GraphError(f"the body of operator '{name}' does not parse: {error}") from error
    if (function.domain, function.name) != (DOMAIN, name):
        raise GraphError(
            f"'{name}.onnxtxt' defines '{function.domain}::{function.name}', not '{DOMAIN}::{name}'"
        )
    return function


def functions_used(graph: gs.Graph) -> list[onnx.FunctionProto]:
    """Return the bodies of the custom operators in a graph, each once, behind those that it calls.

    The ONNX reference evaluator wants callees first.
    """
    bodies: dict[str, onnx.FunctionProto] = {}

    def add(names: Iterable[str]) -> None:
        for name in sorted(set(names)):
            if name not in bodies:
                body = load_function(name)
                add(node.op_type for node in body.node if node.domain == DOMAIN)
                bodies[name] = body

    add(node.op for node in graph.nodes if node.domain == DOMAIN)
    return list(bodies.values())
