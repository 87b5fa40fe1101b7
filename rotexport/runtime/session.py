"""A conversation with a built graph: prompts in, token after token out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from rotexport.errors import ValidationError
from rotexport.runtime.cached import CachedGraph
from rotexport.runtime.opening import open_graph
from rotexport.runtime.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from rotexport.graph.weights import Array

CACHE_VERSION: Final = 1
SAMPLED_BYTES: Final = 1 << 16
SAMPLES: Final = 16


class Session:
    """One stream of tokens through a built graph. A streaming build's cache is constant, a dense one's grows.

    Args:
        path: a build's directory, or its `.onnx` file.
        threads: number of threads; None leaves the choice to ONNX Runtime.
        call_tokens: most tokens per call when a prompt is read; never more than a window.

    Raises:
        TargetError: there is no such graph, or ONNX Runtime refuses it.

    """

    def __init__(self, path: Path, *, threads: int | None = None, call_tokens: int | None = None) -> None:
        file = path / "model.onnx" if path.is_dir() else path
        self.graph = open_graph(file, threads=threads, call_tokens=call_tokens)

    @classmethod
    def over(cls, graph: CachedGraph) -> Session:
        """Return a session that runs a graph opened otherwise: an engine."""
        session = cls.__new__(cls)
        session.graph = graph
        return session

    @property
    def path(self) -> Path:
        """The file that runs."""
        return self.graph.path

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.graph.length

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache now."""
        return self.graph.cache_bytes

    def reset(self) -> None:
        """Forget the stream."""
        self.graph.reset()

    def prefill(self, tokens: Sequence[int] | Array) -> Array:
        """Read tokens and return the logits [vocabulary] that follow the last.

        Raises:
            ValidationError: there are no tokens, or the stream would outgrow the graph's positions.

        """
        logits = None
        whole = self.graph.whole_prompt and self.length == 0 and len(tokens) > 0
        for piece in [tokens] if whole else self.graph.pieces(tokens):
            logits = self.graph.call(piece, [len(piece) - 1])
        if logits is None:
            raise ValidationError("a prompt needs at least one token; got none")
        last: Array = logits[0]
        return last

    def step(self, token: int) -> Array:
        """Read one token; return the logits [vocabulary] that follow."""
        result: Array = self.graph.call([token], [0])[0]
        return result

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[int] = (),
    ) -> Iterator[int]:
        """Read the prompt, then yield token after token until one of `stop` or `max_new_tokens`."""
        choose = sampling.sampler()
        logits = self.prefill(prompt)
        for number in range(max_new_tokens):
            token = choose(logits)
            if token in stop:
                return
            yield token
            if number + 1 < max_new_tokens:
                logits = self.step(token)

    def save(self, path: Path) -> None:
        """Write the cache and the length of the stream to a file."""
        head = {"version": CACHE_VERSION, "model": self._identity(), "length": self.length}
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, head=np.array(json.dumps(head)), **self.graph.state())
        partial.rename(path)

    def restore(self, path: Path) -> None:
        """Continue from a saved cache.

        Raises:
            ValidationError: the file is no cache, or one of another model.

        """
        try:
            with np.load(path, allow_pickle=False) as saved:
                head = json.loads(str(saved["head"]))
                arrays = {name: saved[name] for name in saved.files if name != "head"}
        except (OSError, ValueError, KeyError) as error:
            raise ValidationError(f"'{path}' is not a saved cache: {error}") from error
        if head.get("version") != CACHE_VERSION or head.get("model") != self._identity():
            raise ValidationError(
                f"the cache '{path}' was saved by another model than '{self.path}'; "
                "restore it into the build that saved it, or read the prompt again"
            )
        self.graph.resume(arrays, int(head["length"]))

    def _identity(self) -> str:
        """Return a hash of the graph and of samples of its weights."""
        digest = hashlib.sha256(self.path.read_bytes())
        for file in sorted(self.path.parent.glob("*.data")):
            size = file.stat().st_size
            with file.open("rb") as data:
                for sample in range(SAMPLES):
                    data.seek(size * sample // SAMPLES)
                    digest.update(data.read(SAMPLED_BYTES))
        return digest.hexdigest()
