"""Reading the header of a GGUF file: metadata and tensor table, checked against the file's size.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from rotexport.checkpoint.gguf_tensor import GgufTensor
from rotexport.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


@dataclass(frozen=True)
class GgufFile:
    """Metadata by key (arrays of strings as their length) and tensors by GGUF name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises:
        CheckpointError: the file is truncated, corrupt, or of a version that is not read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} does not start with 'GGUF': it is not a GGUF file, or corrupt")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(path, _Cursor(data), size)
            except (struct.error, UnicodeDecodeError, KeyError, ValueError, OverflowError) as error:
                raise CheckpointError(
                    f"{path} is truncated or corrupt: its header cannot be read ({error}); download it again"
                ) from error


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 4

    def numbers(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        start = self.skip_string()
        return self.data[start : self.position].decode("utf-8")

    def skip_string(self) -> int:
        (length,) = self.numbers("Q")
        start = self.position
        self.position += length
        if self.position > len(self.data):
            raise ValueError(f"a string of {length} bytes at byte {start} does not fit the file")
        return start

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"value type {kind} at byte {self.position} does not exist")
        element, count = self.numbers("IQ")
        if count > len(self.data):
            raise ValueError(f"an array of {count} elements at byte {self.position} does not fit the file")
        if element in _SCALARS:
            return list(self.numbers(f"{count}{_SCALARS[element]}"))
        if element != _STRING:
            raise ValueError(f"an array of type {element} at byte {self.position} does not exist")
        for _ in range(count):
            self.skip_string()
        return count


def _read(path: Path, cursor: _Cursor, size: int) -> GgufFile:
    version, tensor_count, metadata_count = cursor.numbers("IQQ")
    if version not in _VERSIONS:
        raise CheckpointError(f"{path} is GGUF version {version}; versions 2 and 3 (little-endian) are read")
    metadata = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(*cursor.numbers("I"))
    entries = [_read_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, kind, shape, offset in entries:
        tensor = GgufTensor(path, start + offset, kind, shape)
        end = tensor.offset + tensor.stored_bytes
        if min(shape) < 1 or shape[-1] % tensor.block_length or end > size:
            raise CheckpointError(
                f"{path} is truncated or corrupt: it has {size} bytes, and tensor {name!r} "
                f"({kind.name} {list(shape)}) ends at byte {end}; download it again"
            )
        tensors[name] = tensor
    for kind in {tensor.kind for tensor in tensors.values()}:
        _check_readable(path, kind)
    return GgufFile(path, metadata, tensors)


def _check_readable(path: Path, kind: GGMLQuantizationType) -> None:
    try:
        dequantize(np.zeros((1, int(GGML_QUANT_SIZES[kind][1])), np.uint8), kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path} stores tensors as {kind.name}, which cannot be dequantized; use another quantization"
        ) from error


def _read_entry(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.string()
    (rank,) = cursor.numbers("I")
    dimensions = cursor.numbers(f"{rank}Q")  # fastest first
    kind, offset = cursor.numbers("IQ")
    if not 1 <= rank <= 4 or kind not in GGML_QUANT_SIZES:
        raise ValueError(f"tensor {name!r} has rank {rank} and type {kind}")
    return name, GGMLQuantizationType(kind), tuple(reversed(dimensions)), offset
