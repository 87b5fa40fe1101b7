"""A streaming graph in ONNX Runtime: a cache of fixed size, bound to buffers.

The cache is two sets of buffers. A call of several tokens reads one and writes the other, because the ring
must not be written before it is read; a single step reads and writes one set in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rotexport.errors import TargetError
from rotexport.passes.lasting_positions import LAST_POSITION
from rotexport.runtime.cached import CachedGraph
from rotexport.runtime.model import port_of

if TYPE_CHECKING:
    from rotexport.graph.weights import Array

CALL_TOKENS: Final = 256  # scores of a call take memory in proportion


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


class BoundedGraph(CachedGraph):
    """A streaming graph; calls read at most the narrowest window, or `call_tokens`.

    Args:
        path: the `.onnx` file that `session` was opened from.
        session: of ONNX Runtime.
        call_tokens: most tokens per call.

    Raises:
        TargetError: a part of the cache goes in but does not come out.

    """

    last_position = LAST_POSITION

    def __init__(self, path: Path, session: Any, call_tokens: int = CALL_TOKENS) -> None:
        self.path = path
        self._session = session
        self.ports = _cache_ports(session, path)
        windows = [port.shape[2] for port in self.ports if port.name.endswith(".window_key")]
        self.call_tokens = max(1, min(call_tokens, *windows))
        self.whole_prompt = prompt_chooses(port.name for port in self.ports)
        self._current = self._buffers()
        self._other = self._buffers()

    def run(self, tokens: Array, logits_of: Sequence[int], observed: Sequence[str] = ()) -> list[Array]:
        """Read tokens in one call; see `CachedGraph.run`."""
        binding = self._session.io_binding()
        for name, values in call_inputs(tokens, self.length, logits_of).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(values))
        target = self._current if len(tokens) == 1 else self._other
        for port in self.ports:
            binding.bind_ortvalue_input(port.name, self._current[port.name])
            binding.bind_ortvalue_output(port.present, target[port.name])
        wanted = ("logits", *observed)
        for name in wanted:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        if target is self._other:
            self._current, self._other = self._other, self._current
        self.length += len(tokens)
        return [value.numpy()[0] for value in binding.get_outputs()[-len(wanted) :]]

    def reset(self) -> None:
        """Forget the stream."""
        self.length = 0
        for value in self._current.values():
            value.update_inplace(np.zeros(value.shape(), value.numpy().dtype))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, which never change (a prompt uses a second set of the same size)."""
        return sum(port.nbytes for port in self.ports)

    def state(self) -> dict[str, Array]:
        """Return the cache by name."""
        return {name: value.numpy() for name, value in self._current.items()}

    def resume(self, state: dict[str, Array], length: int) -> None:
        """Take up a cache that `state` returned after `length` tokens."""
        for name, values in state.items():
            self._current[name].update_inplace(values)
        self.length = length

    def _buffers(self) -> dict[str, Any]:
        import onnxruntime as ort

        return {p.name: ort.OrtValue.ortvalue_from_numpy(np.zeros(p.shape, p.dtype)) for p in self.ports}


def prompt_chooses(ports: Iterable[str]) -> bool:
    """Whether the call that starts a stream chooses what stays (SnapKV), by the cache tensors' names."""
    return any(name.endswith(".window_observed") for name in ports)


def call_inputs(tokens: Array, length: int, logits_of: Sequence[int]) -> dict[str, Array]:
    """Return what a streaming graph reads besides its cache: tokens [S] of one row behind `length` others."""
    return {
        "input_ids": tokens[None],
        "logit_index": np.asarray(logits_of, np.int64)[None],
        "past_length": np.array([length], np.int32),
        "new_length": np.array([len(tokens)], np.int32),
    }


def _cache_ports(session: Any, path: Path) -> tuple[CachePort, ...]:
    outputs = {output.name for output in session.get_outputs()}
    ports = []
    for node in session.get_inputs():
        if node.name.startswith("cache."):
            port = port_of(node)
            present = f"present.{node.name.removeprefix('cache.')}"
            ports.append(CachePort(node.name, present, port.dtype, (1, *map(int, port.shape[1:]))))
    missing = [port.present for port in ports if port.present not in outputs]
    if missing:
        raise TargetError(f"'{path}' takes '{missing[0]}' in but does not give it back")
    return tuple(ports)
