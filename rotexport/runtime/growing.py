"""A dense graph in ONNX Runtime: a cache that grows by every token it reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rotexport.runtime.cached import CachedGraph
from rotexport.runtime.model import OnnxModel, next_past

if TYPE_CHECKING:
    from rotexport.graph.weights import Array

NO_LIMIT = 2**31


class GrowingGraph(CachedGraph):
    """A dense graph, read in one call unless `call_tokens` says otherwise.

    A stream ends at the model's context (`config.json` beside the graph), if that is known.
    """

    longer = ", or build with attention.kind: streaming"

    def __init__(self, model: OnnxModel, call_tokens: int = NO_LIMIT) -> None:
        self.path = model.path
        self.call_tokens = call_tokens
        self.last_position = _context(model.path.parent) - 1
        self._model = model
        self._presents = [name for name in model.outputs if name.startswith("present.")]
        self._past: dict[str, Array] = {}

    def run(self, tokens: Array, logits_of: Sequence[int], observed: Sequence[str] = ()) -> list[Array]:
        """Read tokens in one call; see `CachedGraph.run`."""
        wanted = ("logits", *observed, *self._presents)
        found = self._model.run(tokens[None], past=self._past, outputs=wanted)
        self._past = next_past({name: found[name] for name in self._presents})
        self.length += len(tokens)
        logits = found["logits"][0]
        chosen = logits if len(logits_of) == len(logits) else logits[np.asarray(logits_of)]
        return [chosen, *(found[name][0] for name in observed)]

    def reset(self) -> None:
        """Forget the stream."""
        self.length = 0
        self._past = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache now: it grows with the stream."""
        return sum(values.nbytes for values in self._past.values())

    def state(self) -> dict[str, Array]:
        """Return the cache by name."""
        return dict(self._past)

    def resume(self, state: dict[str, Array], length: int) -> None:
        """Take up a cache that `state` returned after `length` tokens."""
        self._past = dict(state)
        self.length = length


def _context(folder: Path) -> int:
    file = folder / "config.json"
    if not file.is_file():
        return NO_LIMIT
    config = json.loads(file.read_text())
    return int(config.get("max_position_embeddings", NO_LIMIT))
