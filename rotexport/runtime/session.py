"""A running stream: a streaming graph in ONNX Runtime with its cache, fed token by token.

The cache is two sets of buffers. A call of several tokens reads one and writes the other, because the ring
must not be written before it is read; a single step reads and writes one set in place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rotexport.errors import TargetError, ValidationError
from rotexport.passes.lasting_positions import LAST_POSITION
from rotexport.runtime.model import open_session, port_of
from rotexport.runtime.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from rotexport.graph.weights import Array

CALL_TOKENS: Final = 256  # scores of a call take memory in proportion
CACHE_VERSION: Final = 1
SAMPLED_BYTES: Final = 1 << 16
SAMPLES: Final = 16


@dataclass(frozen=True)
class CachePort:
    """One cache tensor of the graph: its input and output names, [1, *shape] and element type."""

    name: str
    present: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Session:
    """One stream of tokens through a streaming graph.

    Args:
        path: the `.onnx` file of a streaming build, or the directory that holds it as `model.onnx`.
        threads: number of threads; None leaves the choice to ONNX Runtime.
        call_tokens: most tokens per call when a prompt is read; never more than the widest window.

    Raises:
        TargetError: the graph is not a streaming one, or ONNX Runtime refuses it.

    """

    def __init__(self, path: Path, *, threads: int | None = None, call_tokens: int = CALL_TOKENS) -> None:
        self.path = path / "model.onnx" if path.is_dir() else path
        self._session = open_session(self.path, threads=threads)
        self.ports = _cache_ports(self._session, self.path)
        windows = [port.shape[2] for port in self.ports if port.name.endswith(".window_key")]
        self.call_tokens = max(1, min(call_tokens, *windows)) if windows else call_tokens
        self.length = 0
        self._current = self._buffers()
        self._other = self._buffers()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, which never change (a prompt uses a second set of the same size)."""
        return sum(port.nbytes for port in self.ports)

    def reset(self) -> None:
        """Forget the stream."""
        self.length = 0
        for value in self._current.values():
            value.update_inplace(np.zeros(value.shape(), _element(value)))

    def prefill(self, tokens: Sequence[int] | Array) -> Array:
        """Read tokens and return the logits [vocabulary] that follow the last.

        Raises:
            ValidationError: there are no tokens, or the stream would outgrow its position tables.

        """
        logits = None
        for piece in self._pieces(tokens):
            logits = self.call(piece, [len(piece) - 1])
        if logits is None:
            raise ValidationError("a prompt needs at least one token; got none")
        last: Array = logits[0]
        return last

    def step(self, token: int) -> Array:
        """Read one token, updating the cache in place; return the logits [vocabulary] that follow."""
        result: Array = self.call(np.array([token]), [0])[0]
        return result

    def forward(self, tokens: Sequence[int] | Array) -> Iterator[tuple[Array, Array]]:
        """Read tokens; yield, call by call, those read and the logits [tokens, vocabulary] after each."""
        for piece in self._pieces(tokens):
            yield piece, self.call(piece, range(len(piece)))

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

    def call(self, tokens: Array, logits_of: Sequence[int]) -> Array:
        """Run the graph once over tokens [S]; return logits [len(logits_of), vocabulary]."""
        self._check_room(len(tokens))
        feeds = {
            "input_ids": np.asarray(tokens, np.int64)[None],
            "logit_index": np.asarray(logits_of, np.int64)[None],
            "past_length": np.array([self.length], np.int32),
            "new_length": np.array([len(tokens)], np.int32),
        }
        binding = self._session.io_binding()
        for name, values in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(values))
        target = self._current if len(tokens) == 1 else self._other
        for port in self.ports:
            binding.bind_ortvalue_input(port.name, self._current[port.name])
            binding.bind_ortvalue_output(port.present, target[port.name])
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        if target is self._other:
            self._current, self._other = self._other, self._current
        self.length += len(tokens)
        logits: Array = binding.get_outputs()[-1].numpy()[0]
        return logits

    def save(self, path: Path) -> None:
        """Write the cache and the length of the stream to a file."""
        head = {"version": CACHE_VERSION, "model": self._identity(), "length": self.length}
        arrays = {name: value.numpy() for name, value in self._current.items()}
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            np.savez(file, head=np.array(json.dumps(head)), **arrays)
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
        for name, values in arrays.items():
            self._current[name].update_inplace(values)
        self.length = int(head["length"])

    def _pieces(self, tokens: Sequence[int] | Array) -> Iterator[Array]:
        ids = np.asarray(tokens, np.int64)
        self._check_room(len(ids))
        for start in range(0, len(ids), self.call_tokens):
            yield ids[start : start + self.call_tokens]

    def _check_room(self, count: int) -> None:
        if self.length + count > LAST_POSITION + 1:
            raise ValidationError(
                f"{self.length} + {count} tokens pass the last position, {LAST_POSITION}, that the graph has "
                "angles for; reset the stream"
            )

    def _buffers(self) -> dict[str, Any]:
        import onnxruntime as ort

        return {
            p.name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, *p.shape[1:]), p.dtype)) for p in self.ports
        }

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


def _cache_ports(session: Any, path: Path) -> tuple[CachePort, ...]:
    outputs = {output.name for output in session.get_outputs()}
    ports = []
    for node in session.get_inputs():
        if node.name.startswith("cache."):
            port = port_of(node)
            present = f"present.{node.name.removeprefix('cache.')}"
            ports.append(CachePort(node.name, present, port.dtype, (1, *map(int, port.shape[1:]))))
    if not ports or "past_length" not in {node.name for node in session.get_inputs()}:
        raise TargetError(f"'{path}' is not a streaming graph; build with attention.kind: streaming")
    missing = [port.present for port in ports if port.present not in outputs]
    if missing:
        raise TargetError(f"'{path}' takes '{missing[0]}' in but does not give it back")
    return tuple(ports)


def _element(value: Any) -> np.dtype[Any]:
    array: Array = value.numpy()
    return array.dtype
