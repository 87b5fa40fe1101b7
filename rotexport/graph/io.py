"""Writing and reading graphs: one `.onnx` file and one data file, each tensor evaluated and written once."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from rotexport.errors import GraphError, OutputError
from rotexport.graph.functions import DOMAIN, functions_used
from rotexport.graph.weights import Array, LazyWeight, Stored, Weight, set_weight, weight_of

OPSET = 23
IR_VERSION = 11  # what ONNX Runtime and TensorRT both accept with opset 23
INLINE_BYTES = 1024  # smaller tensors stay in the .onnx file, where a person can read them
ALIGNMENT = 64


class Place(NamedTuple):
    """Where a tensor's bytes are: a file beside the model, offset and length in bytes."""

    file: str
    offset: int
    length: int


class WeightStore(ABC):
    """Where a model's tensors go; equal weights share their bytes."""

    @abstractmethod
    def add(self, weight: Weight) -> Place:
        """Write a weight unless its equal is there.

        Raises:
            OutputError: the disk is full, or the file cannot be written.

        """

    @abstractmethod
    def find(self, weight: Weight) -> Array | None:
        """Return the bytes of a weight that was written, memory mapped."""


class WeightFile(WeightStore):
    """One append-only data file. `source` is another store whose evaluated weights are copied."""

    def __init__(self, path: Path, source: WeightStore | None = None) -> None:
        self.path = path
        self._source = source
        self._places: dict[Weight, Place] = {}
        self._end = 0
        self._digest = hashlib.sha256()
        try:
            path.write_bytes(b"")
        except OSError as error:
            raise OutputError(f"cannot write '{path}': {error.strerror}") from error

    @property
    def sha256(self) -> str:
        """Hash of all bytes written so far."""
        return self._digest.hexdigest()

    @property
    def weights(self) -> Collection[Weight]:
        """What was written."""
        return self._places.keys()

    def add(self, weight: Weight) -> Place:
        place = self._places.get(weight)
        if place is not None:
            return place
        data = self._source.find(weight) if self._source is not None else None
        if data is None:
            data = _raw(weight.read())
        padding = -self._end % ALIGNMENT
        try:
            with self.path.open("ab") as file:
                for chunk in (b"\0" * padding, data.data):
                    file.write(chunk)
                    self._digest.update(chunk)
        except OSError as error:
            raise OutputError(
                f"cannot write {data.nbytes} bytes to '{self.path}': {error.strerror}; "
                "free space there or choose another output directory"
            ) from error
        place = Place(self.path.name, self._end + padding, data.nbytes)
        self._end = place.offset + place.length
        self._places[weight] = place
        return place

    def find(self, weight: Weight) -> Array | None:
        place = self._places.get(weight)
        if place is None or place.length == 0:
            return None
        return np.memmap(self.path, np.uint8, "r", place.offset, (place.length,))


class Scratch(WeightStore):
    """The store between passes: what a pass changed goes to a new file, and files nobody needs any more go.

    A pipeline that saves its graph after every pass so writes only what changed, and holds two
    generations of a weight at most.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = [WeightFile(directory / "scratch-0.data")]
        self._count = 1

    def add(self, weight: Weight) -> Place:
        holder = next((file for file in self._files if weight in file.weights), self._files[-1])
        return holder.add(weight)

    def find(self, weight: Weight) -> Array | None:
        return next((data for file in self._files if (data := file.find(weight)) is not None), None)

    def retire(self, graph: gs.Graph) -> None:
        """Delete the files that hold nothing of `graph`, and let the next pass begin a new one."""
        used = {weight_of(tensor) for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)}
        for file in [file for file in self._files if used.isdisjoint(file.weights)]:
            file.path.unlink()
            self._files.remove(file)
        self._files.append(WeightFile(self.directory / f"scratch-{self._count}.data"))
        self._count += 1


def save_model(graph: gs.Graph, path: Path, weights: WeightStore) -> None:
    """Write `graph` to `path`, its tensors into `weights` (a file in the same directory).

    Raises:
        OutputError: the directory cannot be written, or is full.

    """
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            _place(tensor, weights)
    model = to_proto(graph)
    temporary = path.with_suffix(".partial")
    try:
        temporary.write_bytes(model.SerializeToString())
        temporary.rename(path)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror}") from error


def to_proto(graph: gs.Graph) -> onnx.ModelProto:
    """Export a graph whose lazy constants have been placed, with the custom operators' bodies."""
    model = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = IR_VERSION
    foreign = [body for body in model.functions if body.domain != DOMAIN]  # of a graph that was read
    functions = [*foreign, *functions_used(graph)]
    del model.functions[:]
    model.functions.extend(functions)
    domains = {"": OPSET} | {function.domain: 1 for function in functions}
    del model.opset_import[:]
    model.opset_import.extend(
        onnx.helper.make_opsetid(domain, version) for domain, version in domains.items()
    )
    model.producer_name = "rotexport"
    return model


def _place(tensor: gs.Constant, weights: WeightStore) -> None:
    weight = weight_of(tensor)
    if not isinstance(tensor._values, LazyWeight):
        if weight.nbytes <= INLINE_BYTES:
            return
        tensor.values = LazyWeight(weight)
    proto = onnx.TensorProto()
    proto.name = tensor.name
    proto.dims.extend(weight.shape)
    proto.data_type = onnx.helper.np_dtype_to_tensor_dtype(weight.dtype)
    if weight.nbytes <= INLINE_BYTES:
        proto.raw_data = _raw(weight.read()).tobytes()
    else:
        place = weights.add(weight)
        proto.data_location = onnx.TensorProto.EXTERNAL
        entries = (("location", place.file), ("offset", place.offset), ("length", place.length))
        for key, value in entries:
            proto.external_data.add(key=key, value=str(value))
    tensor._values.tensor = proto


def _raw(values: Array) -> Array:
    """Return the bytes of a tensor as ONNX stores them: little-endian, 4-bit elements low nibble first."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype.name in ("int4", "uint4"):
        nibbles = flat.astype(np.int8).view(np.uint8) & 0xF
        if nibbles.size % 2:
            nibbles = np.append(nibbles, np.uint8(0))
        return nibbles[0::2] | nibbles[1::2] << 4
    return flat.view(np.uint8)


def load_model(path: Path) -> gs.Graph:
    """Read a saved graph; external tensors stay lazy references into their files.

    Raises:
        GraphError: the file is missing, is no ONNX model, or refers to data that is not there.

    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise GraphError(f"'{path}' cannot be read as an ONNX model: {error}") from error
    external = {
        tensor.name: _stored(tensor, path)
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    graph = gs.import_onnx(model)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and tensor.name in external:
            set_weight(tensor, external[tensor.name])
    return graph


def _stored(tensor: onnx.TensorProto, path: Path) -> Stored:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = path.parent / entries["location"]
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    stored = Stored(file, int(entries.get("offset", 0)), dtype, tuple(tensor.dims))
    size = file.stat().st_size if file.is_file() else 0
    if size < stored.offset + stored.nbytes:
        raise GraphError(
            f"'{path}' refers to {stored.nbytes} bytes at offset {stored.offset} of '{file}', "
            f"which holds {size}; "
            "copy the data file beside the model again"
        )
    return stored
