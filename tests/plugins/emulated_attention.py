"""Calls sink/window attention on the emulator with NumPy arrays."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from c_calls import call
from emulated import EmulatorError
from structures import ATTENTION_CACHE, AttentionOperands

TYPES = {np.dtype(np.float16): 0, np.dtype(ml_dtypes.bfloat16): 1}


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
    cache = ATTENTION_CACHE
    operands: type[ctypes.Structure] = AttentionOperands

    def __init__(self, library: Path) -> None:
        self._run = getattr(ctypes.CDLL(str(library)), self.function)

    def run(
        self, problem: ctypes.Structure, given: Call, *, in_place: bool = True, schedule: int = 0
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the output [B, Hq, S, Dv] and the updated cache."""
        names = Call.__dataclass_fields__.keys() - {"cache", "others"}
        held = {name: np.array(getattr(given, name)) for name in names} | given.others
        cache = {name: tensor.copy() for name, tensor in given.cache.items()}
        shape = (*held["query"].shape[:3], held["value"].shape[3])
        output = np.empty(shape, held["query"].dtype)
        operands = self.operands(output=output.ctypes.data, **{n: t.ctypes.data for n, t in held.items()})
        for i, name in enumerate(self.cache):
            operands.cache[i] = cache[name].ctypes.data if name in cache else None
        options = (ctypes.c_int(in_place), ctypes.c_uint64(schedule))
        call(self._run, ctypes.byref(problem), ctypes.byref(operands), *options, error=EmulatorError)
        return output, cache
