"""The host from Python: drives a plugin library with NumPy arrays through librotexport_host.so."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

# nvinfer1::DataType and nvinfer1::PluginFieldType
DATA_TYPES = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    np.dtype(np.int8): 2,
    np.dtype(np.int32): 3,
    np.dtype(ml_dtypes.bfloat16): 7,
    np.dtype(np.int64): 8,
}
FIELD_TYPES = {
    np.dtype(np.float32): 1,
    np.dtype(np.int32): 5,
    np.dtype(np.int64): 10,
    np.dtype(np.float64): 2,
}
_TEXT = 65536
_MOST_OUTPUTS = 16


class HostError(Exception):
    """The step of a plugin's life that failed, and what the plugin reported."""


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    )


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("plugin", ctypes.c_char_p),
        ("fields", ctypes.POINTER(_Field)),
        ("field_count", ctypes.c_int32),
        ("inputs", ctypes.POINTER(_Tensor)),
        ("input_count", ctypes.c_int32),
        ("largest", ctypes.POINTER(_Tensor)),
        ("aliases", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Request:
    """A plugin's name, creation fields and inputs; `largest` holds the inputs' largest shapes.

    With `aliases` outputs are bound to the inputs that the plugin names for them.
    """

    plugin: str
    inputs: list[np.ndarray]
    fields: list[tuple[str, np.ndarray]] = field(default_factory=list)
    largest: list[tuple[int, ...]] | None = None
    aliases: bool = True


def _tensor(array: np.ndarray, shape: tuple[int, ...] | None = None) -> _Tensor:
    shape = array.shape if shape is None else shape
    dims = (ctypes.c_int64 * 8)(*shape)
    return _Tensor(DATA_TYPES[array.dtype], len(shape), dims, array.ctypes.data, array.nbytes)


class Host:
    """A loaded plugin library. `build` is a build directory of plugins/: emulator or cuda."""

    def __init__(self, build: Path) -> None:
        self._host = ctypes.CDLL(str(build / "librotexport_host.so"))
        path = next(build.glob("librotexport_plugins_trt*.so"))
        self._library = ctypes.c_void_p()
        self._call("host_open", str(path).encode(), ctypes.byref(self._library))

    def _call(self, function: str, *arguments: object) -> None:
        message = ctypes.create_string_buffer(4096)
        if getattr(self._host, function)(*arguments, message, ctypes.c_size_t(len(message))):
            raise HostError(message.value.decode())

    def _text(self, function: str, *arguments: object) -> str:
        text = ctypes.create_string_buffer(_TEXT)
        self._call(function, *arguments, text, ctypes.c_size_t(_TEXT))
        return text.value.decode()

    def creators(self) -> list[list[str]]:
        """Return name, version, namespace, interface and fields (name:type:length) of every creator."""
        return [line.split("\t") for line in self._text("host_creators", self._library).splitlines()]

    def combinations(self, request: Request) -> tuple[set[tuple[int, ...]], int]:
        """Return the type combinations accepted in linear format, and how often another format was."""
        with_pointers = self._pack(request)
        lines = self._text("host_combinations", self._library, ctypes.byref(with_pointers)).splitlines()
        return {tuple(map(int, line.split(","))) for line in lines[:-1]}, int(lines[-1])

    def live(self, request: Request) -> list[np.ndarray]:
        """Walk a plugin through its whole life and return its outputs."""
        room = [
            np.empty(max(array.nbytes for array in request.inputs) + 4096, np.uint8)
            for _ in range(_MOST_OUTPUTS)
        ]
        outputs = (_Tensor * _MOST_OUTPUTS)(
            *(_Tensor(0, 0, (ctypes.c_int64 * 8)(), r.ctypes.data, r.nbytes) for r in room)
        )
        count = ctypes.c_int32(_MOST_OUTPUTS)
        with_pointers = self._pack(request)
        self._call("host_live", self._library, ctypes.byref(with_pointers), outputs, ctypes.byref(count))
        dtypes = {code: dtype for dtype, code in DATA_TYPES.items()}
        return [
            r[: output.bytes].view(dtypes[output.type]).reshape(output.dims[: output.rank]).copy()
            for r, output in zip(room[: count.value], outputs, strict=False)
        ]

    @staticmethod
    def _pack(request: Request) -> _Request:
        fields = [
            _Field(name.encode(), FIELD_TYPES[value.dtype], value.size, value.ctypes.data, value.nbytes)
            for name, value in request.fields
        ]
        inputs = [_tensor(array) for array in request.inputs]
        packed = _Request(
            request.plugin.encode(),
            (_Field * len(fields))(*fields),
            len(fields),
            (_Tensor * len(inputs))(*inputs),
            len(inputs),
            aliases=request.aliases,
        )
        if request.largest is not None:
            shapes = [
                _tensor(array, shape) for array, shape in zip(request.inputs, request.largest, strict=True)
            ]
            packed.largest = (_Tensor * len(shapes))(*shapes)
        return packed
