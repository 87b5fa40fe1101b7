"""Calls sink/window attention on the emulator with NumPy arrays."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from emulated import EmulatorError

TYPES = {np.dtype(np.float16): 0, np.dtype(ml_dtypes.bfloat16): 1}
FORMATS = {None: 0, 8: 1, 4: 2, 2: 3, "fp8": 4}  # by bits of a level
CACHE = tuple(f"{part}_{kind}" for part in ("sink", "window") for kind in ("key", "value"))
CACHE += ("window_key_scale", "window_value_scale", "recent_key", "recent_value")
OTHERS = ("key_mean", "mean_query", "mean_angles", "signs")


def _operands_of(cache_tensors: int) -> type[ctypes.Structure]:
    class Operands(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_void_p) for name in ("query", "query_sink", "key", "value")),
            *((name, ctypes.c_void_p) for name in ("past_length", "new_length", "decay")),
            ("cache", ctypes.c_void_p * cache_tensors),
            ("output", ctypes.c_void_p),
            *((name, ctypes.c_void_p) for name in OTHERS),
        )

    return Operands


@dataclass(frozen=True)
class Call:
    """One call's inputs, as the operator takes them; `cache` by name, and what only some operators take."""

    query: np.ndarray
    query_sink: np.ndarray
    key: np.ndarray
    value: np.ndarray
    past_length: np.ndarray
    new_length: np.ndarray
    decay: np.ndarray
    cache: dict[str, np.ndarray]
    others: dict[str, np.ndarray] = field(default_factory=dict)


class EmulatedAttention:
    function = "emulated_attention"
    cache = CACHE

    def __init__(self, library: Path) -> None:
        self._run = getattr(ctypes.CDLL(str(library)), self.function)

    def run(
        self, problem: ctypes.Structure, call: Call, *, in_place: bool = True, schedule: int = 0
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the output [B, Hq, S, Dv] and the updated cache."""
        names = Call.__dataclass_fields__.keys() - {"cache", "others"}
        held = {name: np.array(getattr(call, name)) for name in names} | call.others
        cache = {name: tensor.copy() for name, tensor in call.cache.items()}
        shape = (*held["query"].shape[:3], held["value"].shape[3])
        output = np.empty(shape, held["query"].dtype)
        operands = _operands_of(len(self.cache))(
            output=output.ctypes.data, **{n: t.ctypes.data for n, t in held.items()}
        )
        for i, name in enumerate(self.cache):
            operands.cache[i] = cache[name].ctypes.data if name in cache else None
        message = ctypes.create_string_buffer(1024)
        failed = self._run(
            ctypes.byref(problem),
            ctypes.byref(operands),
            ctypes.c_int(in_place),
            ctypes.c_uint64(schedule),
            message,
            ctypes.c_size_t(1024),
        )
        if failed:
            raise EmulatorError(message.value.decode())
        return output, cache
