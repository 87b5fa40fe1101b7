"""Calls the kernels on the emulator with NumPy arrays."""

from __future__ import annotations

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
from c_calls import call
from structures import HadamardProblem

TYPES = {np.dtype(np.float16): 0, np.dtype(ml_dtypes.bfloat16): 1, np.dtype(np.float32): 2}
OUTPUTS = {"same": 0, "int8": 1, "int4": 2}


class EmulatorError(Exception):
    """What the planner refused or the emulator reported."""


class EmulatedKernels:
    def __init__(self, build: Path) -> None:
        self.library = ctypes.CDLL(str(build / "librotexport_emulated_kernels.so"))

    def fast_hadamard(
        self,
        x: np.ndarray,
        signs: np.ndarray,
        base: np.ndarray,
        sylvester: int,
        output: str = "same",
        *,
        clip: float = 1.0,
        schedule: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (y or codes, scales) for x [rows, D], signs [D] of x's type and base int8 [m, m]."""
        rows, row = x.shape
        problem = HadamardProblem(TYPES[x.dtype], OUTPUTS[output], rows, row, len(base), sylvester, clip)
        y = {
            "same": np.empty_like(x),
            "int8": np.empty((rows, row), np.int8),
            "int4": np.empty((rows, row // 2), np.int8),
        }[output]
        scale = np.empty((rows, 1), np.float32)
        arrays = [np.ascontiguousarray(x), np.ascontiguousarray(signs), np.ascontiguousarray(base), y, scale]
        call(
            self.library.emulated_fast_hadamard,
            ctypes.byref(problem),
            *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
            ctypes.c_uint64(schedule),
            error=EmulatorError,
        )
        return y, scale
