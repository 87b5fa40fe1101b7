"""What a pass is: a named rewrite that says what it preserves and how often it fired."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum

import onnx_graphsurgeon as gs


class Preserves(Enum):
    """What stays equal between the graph before and after a pass."""

    ROUNDING = "equal within rounding"
    PRECISION = "equal within the rounding of a narrower float type"
    QUANTIZATION = "changed by quantization"


@dataclass
class PassReport:
    """How many rewrites a pass made, and what a reader of the build report should know of them."""

    changed: int = 0
    notes: list[str] = field(default_factory=list)


class Pass(ABC):
    """A rewrite of one graph, in place."""

    name: str
    preserves: Preserves

    @abstractmethod
    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite `graph`; raise before changing anything when the precondition does not hold."""
