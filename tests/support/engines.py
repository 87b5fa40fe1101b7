"""A stand-in for TensorRT's Python library: "plans" name ONNX files, which ONNX Runtime computes.

It checks what the library would: addresses and shapes set for every input, within a profile.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

__version__ = "9.9"
PROFILES = {"batch": (1, 1, 1), "sequence": (1, 1, 16), "logit_count": (1, 1, 16), "past": (0, 8, 23)}
ELEMENTS = {"float": "FLOAT", "float16": "HALF", "int8": "INT8", "int32": "INT32", "int64": "INT64"}


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class Logger:
    ERROR = 1

    def __init__(self, severity: int) -> None: ...


class Runtime:
    def __init__(self, logger: Logger) -> None: ...

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        path = Path(plan.decode())
        return Engine(path) if path.is_file() else None


class Engine:
    num_optimization_profiles = 1

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.ports = {p.name: p for p in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [p.name for p in self.session.get_inputs()]
        self.num_io_tensors = len(self.ports)

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=ELEMENTS[self.ports[name].type.removeprefix("tensor(").rstrip(")")])

    def get_aliased_input_tensor(self, name: str) -> str:
        return ""

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        whole = {**PROFILES, "total": (1, 9, 24)}
        dims = [whole.get(dim, (dim,) * 3) for dim in self.ports[name].shape]
        return [[int(dim[which]) for dim in dims] for which in range(3)]

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return index == 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address != 0
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> list[int]:
        sizes = {"batch": 1}
        for port in self.engine.inputs:
            sizes |= dict(zip(self.engine.ports[port].shape, self.shapes[port], strict=True))
        return [sizes[dim] if isinstance(dim, str) else dim for dim in self.engine.ports[name].shape]

    def execute_async_v3(self, stream: int) -> bool:
        feeds = {name: self._array(name, self.shapes[name]).copy() for name in self.engine.inputs}
        outputs = [name for name in self.engine.ports if name not in self.engine.inputs]
        for name, found in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
            self._array(name, found.shape)[...] = found
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        element = self.engine.ports[name].type.removeprefix("tensor(").rstrip(")")
        dtype = np.dtype({"float": "float32"}.get(element, element))
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)
