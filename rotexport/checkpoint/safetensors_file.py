"""Reading the header of a `.safetensors` file: names, types, shapes and offsets, checked against its size."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rotexport.errors import CheckpointError
from rotexport.graph.weights import Stored, Weight

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MAX_HEADER = 100_000_000  # the format's own limit


def read_header(path: Path) -> dict[str, Weight]:
    """Return the tensors of the file by stored name, without reading them.

    Raises:
        CheckpointError: the file is truncated or is not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start == b"version ":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull`")
        if not 2 <= length <= _MAX_HEADER or 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: it announces a header of {length} bytes "
                f"and has {size} bytes in all; download it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors: dict[str, Weight] = {
            name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()
        }
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a corrupt header ({error!r}); download it again") from error
    if 8 + length + end > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes, its header describes {8 + length + end}; "
            "download it again"
        )
    return tensors


def _tensor(path: Path, name: str, entry: dict[str, Any], data: int) -> Stored:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"tensor {name!r} in {path} has type {entry['dtype']!r}; "
            "pass the model in float32, float16 or bfloat16"
        )
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    shape = tuple(int(length) for length in entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise CheckpointError(
            f"{path} is corrupt: tensor {name!r} of type {entry['dtype']} and shape {list(shape)} "
            f"cannot occupy {end - begin} bytes; download it again"
        )
    return Stored(path, data + begin, dtype, shape)
