"""Running a saved graph in ONNX Runtime, faithfully enough to serve as evidence.

The defaults of ONNX Runtime are chosen for speed: 4-bit matrices are multiplied in int8, on CPUs without VNNI
int8 products saturate at 16 bits, and fp8 products do not load. Here quantized operands are multiplied as the
floats that they stand for, so that an error that is measured belongs to the graph.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from rotexport.errors import TargetError, ValidationError
from rotexport.runtime.deferral import defer_widening

if TYPE_CHECKING:
    from rotexport.graph.weights import Array

LARGE_WEIGHTS = 1 << 30  # bytes as float32 from which weights stay in the mapped file, not in memory

_ELEMENT_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Port:
    """A graph input or output: a symbolic dimension is a string, one without a name is empty."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


class OnnxModel:
    """A decoder graph in an ONNX Runtime session: `input_ids` in, `logits` out, the cache optional.

    Args:
        path: the `.onnx` file; external data is found beside it.
        threads: number of threads; None leaves the choice to ONNX Runtime.
        low_memory: keep weights in the mapped file: slower, but anonymous memory no longer grows with the
            model. None decides by the size of the weights.
        extra_outputs: names of inner tensors that `run` may return too.

    Raises:
        TargetError: ONNX Runtime is not installed, or refuses the file.

    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        low_memory: bool | None = None,
        extra_outputs: Sequence[str] = (),
    ) -> None:
        self._take(path, open_session(path, threads, low_memory, extra_outputs))

    @classmethod
    def over(cls, path: Path, session: Any) -> OnnxModel:
        """Return the model of a session that `open_session` opened at `path`."""
        model = cls.__new__(cls)
        model._take(path, session)
        return model

    def _take(self, path: Path, session: Any) -> None:
        self.path = path
        self._session = session
        self.inputs = {port.name: port for port in map(port_of, self._session.get_inputs())}
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        if "input_ids" not in self.inputs:
            raise TargetError(
                f"'{path}' is not a decoder: it has no input 'input_ids' but {list(self.inputs)}"
            )

    @property
    def cache_inputs(self) -> list[Port]:
        """The ports of the key/value cache, scales of quantized caches included."""
        return [port for port in self.inputs.values() if port.name.startswith("past_key_values.")]

    def run(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        past: Mapping[str, Array] | None = None,
        outputs: Sequence[str] = ("logits",),
    ) -> dict[str, Array]:
        """Run one call and return the named outputs.

        Args:
            input_ids: int [B, S].
            attention_mask: int [B, past + S], 1 for real tokens; None means that all are.
            past: what an earlier call returned as `present.*` (see `next_past`); None is an empty cache.
            outputs: names of graph outputs.

        """
        unknown = [name for name in outputs if name not in self.outputs]
        if unknown:
            raise ValidationError(f"'{self.path}' has no output '{unknown[0]}'; it has {list(self.outputs)}")
        feeds = self._feeds(input_ids, attention_mask, past or {})
        values = self._session.run(list(outputs), feeds)
        return dict(zip(outputs, values, strict=True))

    def forward_many(
        self, windows: Iterable[Array], outputs: Sequence[str] = ("logits",)
    ) -> Iterator[dict[str, Array]]:
        """Run windows of token ids [S] one by one, each from an empty cache."""
        for window in windows:
            yield self.run(window[None], outputs=outputs)

    def _feeds(self, input_ids: Array, mask: Array | None, past: Mapping[str, Array]) -> dict[str, Array]:
        batch, sequence = input_ids.shape
        feeds = {port.name: past.get(port.name, _empty(port, batch)) for port in self.cache_inputs}
        if mask is None:
            mask = np.ones((batch, self._past_length(feeds) + sequence), np.int64)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -sequence:]
        known = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        for name, port in self.inputs.items():
            if name in known:
                feeds[name] = known[name].astype(port.dtype, copy=False)
            elif name not in feeds:
                raise TargetError(f"'{self.path}' wants the input '{name}', which decoders do not have")
        return feeds

    def _past_length(self, feeds: Mapping[str, Array]) -> int:
        for port in self.cache_inputs:
            if port.name.endswith(".key"):
                return int(feeds[port.name].shape[_past_axis(port)])
        return 0


def next_past(presents: Mapping[str, Array]) -> dict[str, Array]:
    """Rename `present.N.*` outputs to the `past_key_values.N.*` inputs of the next call."""
    return {name.replace("present.", "past_key_values.", 1): value for name, value in presents.items()}


def tensors_among(path: Path, names: Sequence[str]) -> list[str]:
    """Return those of `names` that are tensors a node of the model at `path` computes."""
    computed = _computed(_read(path))
    return [name for name in names if name in computed]


def unpacked_bytes(path: Path) -> int:
    """Return the size of a model's weights as float32, which is what ONNX Runtime likes to turn them into."""
    return sum(4 * math.prod(tensor.dims) for tensor in _read(path).graph.initializer)


def open_session(
    path: Path,
    threads: int | None = None,
    low_memory: bool | None = None,
    extra_outputs: Sequence[str] = (),
) -> Any:
    """Open a graph in ONNX Runtime with exact products; arguments and errors are those of `OnnxModel`."""
    if not path.is_file():
        raise TargetError(f"there is no model at '{path}'; build one first, or correct the path")
    if low_memory is None:
        low_memory = unpacked_bytes(path) >= LARGE_WEIGHTS
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise TargetError(
            "running a graph needs ONNX Runtime, which is not installed: "
            "install rotexport with its 'cpu' extra (or 'gpu'), for example pip install 'rotexport[cpu]'"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3  # a warning per removed initializer says nothing about the model
    if threads is not None:
        options.intra_op_num_threads = threads
    # No integer kernels in place of dequantized products: integers below 2^24 are exact in fp32 anyway.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if low_memory:
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    # Folding turns quantized weights into resident 32-bit copies, the last level of optimization 16-bit ones.
    disabled = ["ConstantFolding"] if low_memory else []
    source: str | bytes = str(path)
    if extra_outputs or low_memory:
        source = _edited(path, extra_outputs, low_memory)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
        )
    try:
        return ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        reason = re.sub(r"\s+", " ", str(error))
        raise TargetError(f"ONNX Runtime cannot load '{path}': {reason}") from error


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise TargetError(f"'{path}' cannot be read as an ONNX model: {error}") from error


def _edited(path: Path, names: Sequence[str], low_memory: bool) -> bytes:
    """Return a model with more outputs, and with weights widened one by one where memory is short."""
    model = _read(path)
    if low_memory:
        defer_widening(model)
    computed = _computed(model)
    present = {output.name for output in model.graph.output}
    for name in names:
        if name not in computed:
            raise ValidationError(f"'{path}' has no tensor '{name}' to observe")
        if name not in present:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    serialized: bytes = model.SerializeToString()
    return serialized


def _computed(model: onnx.ModelProto) -> set[str]:
    return {output for node in model.graph.node for output in node.output}


def port_of(node: Any) -> Port:
    """Describe an input or output of an ONNX Runtime session."""
    if node.type not in _ELEMENT_TYPES:
        raise TargetError(f"input '{node.name}' has type {node.type}, which cannot be fed on the CPU")
    shape = tuple(dim if isinstance(dim, int) else dim or "" for dim in node.shape)
    return Port(node.name, np.dtype(_ELEMENT_TYPES[node.type]), shape)


def _past_axis(port: Port) -> int:
    symbols = [axis for axis, dim in enumerate(port.shape) if isinstance(dim, str)]
    return symbols[-1]


def _empty(port: Port, batch: int) -> Array:
    """Return an empty cache: the leading symbol is the batch, every other symbol is the past length 0."""
    symbols = (batch if axis == 0 else 0 for axis in range(len(port.shape)))
    shape = [dim if isinstance(dim, int) else symbol for dim, symbol in zip(port.shape, symbols, strict=True)]
    return np.zeros(shape, port.dtype)
