"""Writing graphs: one `.onnx` file and one data file, each tensor evaluated and written once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rotexport.errors import OutputError
from rotexport.graph.functions import functions_used
from rotexport.graph.weights import Array, LazyWeight, Weight, weight_of

OPSET = 23
IR_VERSION = 11  # what ONNX Runtime and TensorRT both accept with opset 23
INLINE_BYTES = 1024  # smaller tensors stay in the .onnx file, where a person can read them
ALIGNMENT = 64


class WeightFile:
    """An append-only external data file in which equal weights share their bytes.

    Used for the final model, and as the scratch store between passes: a graph saved after a pass adds only
    the tensors that the pass changed.
    """

    def __init__(self, path: Path, source: WeightFile | None = None) -> None:
        self.path = path
        self._source = source  # where already evaluated weights can be copied from
        self._places: dict[Weight, tuple[int, int]] = {}
        self._end = 0
        self._digest = hashlib.sha256()
        try:
            path.touch()
        except OSError as error:
            raise OutputError(f"cannot write '{path}': {error.strerror}") from error

    @property
    def sha256(self) -> str:
        """Hash of all bytes written so far."""
        return self._digest.hexdigest()

    def add(self, weight: Weight) -> tuple[int, int]:
        """Write a weight unless its equal is there; return its offset and length in bytes."""
        place = self._places.get(weight)
        if place is not None:
            return place
        data = self._source._peek(weight) if self._source is not None else None
        if data is None:
            data = _raw(weight.read())
        padding = -self._end % ALIGNMENT
        try:
            with self.path.open("ab") as file:
                self._append(file, b"\0" * padding)
                self._append(file, data.data)
        except OSError as error:
            raise OutputError(
                f"cannot write {data.nbytes} bytes to '{self.path}': {error.strerror}; "
                "free space there or choose another output directory"
            ) from error
        place = (self._end + padding, data.nbytes)
        self._end = place[0] + place[1]
        self._places[weight] = place
        return place

    def _append(self, file: IO[bytes], data: bytes | memoryview) -> None:
        file.write(data)
        self._digest.update(data)

    def _peek(self, weight: Weight) -> Array | None:
        place = self._places.get(weight)
        if place is None or place[1] == 0:
            return None
        return np.memmap(self.path, np.uint8, "r", place[0], (place[1],))


def save_model(graph: gs.Graph, path: Path, weights: WeightFile) -> None:
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
    functions = functions_used(graph)
    model.functions.extend(functions)
    domains = {"": OPSET} | {function.domain: 1 for function in functions}
    del model.opset_import[:]
    model.opset_import.extend(
        onnx.helper.make_opsetid(domain, version) for domain, version in domains.items()
    )
    model.producer_name = "rotexport"
    return model


def _place(tensor: gs.Constant, weights: WeightFile) -> None:
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
        offset, length = weights.add(weight)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", weights.path.name), ("offset", offset), ("length", length)):
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
