"""What a pass is: a named rewrite that says what it preserves and how often it fired."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from rotexport.transforms.transform import Transform

SIXTEEN_BITS = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class Preserves(Enum):
    """What stays equal between the graph before and after a pass."""

    ROUNDING = "equal within rounding"
    PRECISION = "equal within the rounding of a narrower float type"
    QUANTIZATION = "changed by quantization"
    CHANGED = "changed as the recipe asks"


def rounding(graph: gs.Graph) -> Preserves:
    """Return what computing the same in another order preserves: less where the graph computes in 16 bits."""
    types = (t.dtype for node in graph.nodes for t in node.outputs if t.dtype is not None)
    narrow = any(np.dtype(kind) in SIXTEEN_BITS for kind in types)
    return Preserves.PRECISION if narrow else Preserves.ROUNDING


class Where(Enum):
    """How a transform entered the graph."""

    FOLDED = "folded"  # into weights: free at run time
    ONLINE = "online"  # as an operator, with its counterpart folded where weights absorb it
    REFUSED = "refused"


@dataclass(frozen=True)
class Placement:
    """Where one transform went.

    `rotation` is r1, r2, r3, r4 or o_heads; `site` is `block.role` or `residual`.
    """

    rotation: str
    site: str
    where: Where
    transform: Transform | None  # None when refused
    reason: str = ""  # why online, or why refused


@dataclass
class PassReport:
    """How many rewrites a pass made, and what a reader of the build report should know of them."""

    changed: int = 0
    notes: list[str] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)


class Pass(ABC):
    """A rewrite of one graph, in place."""

    name: str
    preserves: Preserves

    @abstractmethod
    def run(self, graph: gs.Graph) -> PassReport:
        """Rewrite `graph`; raise before changing anything when the precondition does not hold."""
