"""Asks a plugin library, node by node, whether its kernels take what a graph asks of them.

The library's own plugins answer, so limits are stated once, where the kernels are. It is loaded in a process
of its own, without TensorRT: `python -m rotexport.plugins.judging LIBRARY` reads and prints JSON.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from onnx import TensorProto

from rotexport.errors import TargetError

# nvinfer1::DataType and nvinfer1::PluginFieldType
DATA_TYPES: Final = {
    TensorProto.FLOAT: 0,
    TensorProto.FLOAT16: 1,
    TensorProto.INT8: 2,
    TensorProto.INT32: 3,
    TensorProto.BOOL: 4,
    TensorProto.UINT8: 5,
    TensorProto.FLOAT8E4M3FN: 6,
    TensorProto.BFLOAT16: 7,
    TensorProto.INT64: 8,
    TensorProto.INT4: 9,
}
_FLOAT_FIELD, _INT_FIELD = 1, 5
_MOST_AXES = 8
_MESSAGE = 1024


@dataclass(frozen=True)
class NodeInput:
    """An input of a node: ONNX's number of its element type, the smallest and the largest shape."""

    dtype: int
    smallest: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A node: its operator, the numbers it is created from, its inputs."""

    operator: str
    numbers: Mapping[str, int | float]
    inputs: tuple[NodeInput, ...]


class _Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("type", ctypes.c_int32), ("data", ctypes.c_void_p))


class _Input(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("smallest", ctypes.c_int64 * _MOST_AXES),
        ("largest", ctypes.c_int64 * _MOST_AXES),
    )


def judge(library: Path, questions: Sequence[Question]) -> list[str | None]:
    """Return for each question None where a kernel takes the node, else why it does not.

    Raises:
        TargetError: the library does not load, or is too old to be asked.

    """
    command = [sys.executable, "-m", "rotexport.plugins.judging", str(library.resolve())]
    asked = json.dumps([asdict(question) for question in questions])
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
        raise TargetError(f"{library} cannot be asked what its kernels take: {reason[0]}; build it again")
    answers: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    return answers


def _ask(library: ctypes.CDLL, question: Question) -> str | None:
    numbers = [
        ctypes.c_int32(n) if isinstance(n, int) else ctypes.c_float(n) for n in question.numbers.values()
    ]
    fields = [
        _Field(name.encode(), _INT_FIELD if isinstance(n, ctypes.c_int32) else _FLOAT_FIELD, _address(n))
        for name, n in zip(question.numbers, numbers, strict=True)
    ]
    inputs = []
    for one in question.inputs:
        if one.dtype not in DATA_TYPES or len(one.largest) > _MOST_AXES:
            return f"TensorRT has no tensors of type {one.dtype} and {len(one.largest)} axes"
        shapes = [(ctypes.c_int64 * _MOST_AXES)(*shape) for shape in (one.smallest, one.largest)]
        inputs.append(_Input(DATA_TYPES[one.dtype], len(one.largest), *shapes))
    message = ctypes.create_string_buffer(_MESSAGE)
    refused = library.rotexport_judge(
        question.operator.encode(),
        (_Field * len(fields))(*fields),
        ctypes.c_int32(len(fields)),
        (_Input * len(inputs))(*inputs),
        ctypes.c_int32(len(inputs)),
        message,
        ctypes.c_size_t(_MESSAGE),
    )
    return message.value.decode().removeprefix(f"rotexport: {question.operator}: ") if refused else None


def _address(number: ctypes.c_int32 | ctypes.c_float) -> ctypes.c_void_p:
    return ctypes.cast(ctypes.pointer(number), ctypes.c_void_p)


def _main(path: str) -> None:
    library = ctypes.CDLL(path)
    questions = [
        Question(one["operator"], one["numbers"], tuple(NodeInput(**given) for given in one["inputs"]))
        for one in json.load(sys.stdin)
    ]
    print(json.dumps([_ask(library, question) for question in questions]))


if __name__ == "__main__":
    _main(sys.argv[1])
