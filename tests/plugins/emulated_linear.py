"""Calls the QuantizedLinear kernels on the emulator with NumPy arrays."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from c_calls import call
from emulated import TYPES, EmulatorError
from structures import LinearProblem
from support.quantized_linear import Case, Operands

FORMATS = {"W8A8": 0, "W4A8": 1, "W4A4": 2}
ENDINGS = {"": 0, "Residual": 1, "Gated": 2}


def problem_of(case: Case) -> LinearProblem:
    return LinearProblem(
        *(FORMATS[case.form], TYPES[case.out], ENDINGS[case.ending]),
        *(case.rows, case.inputs, case.outputs, case.group, case.groups),
        case.groups if case.row_groups else 1,
        case.two_level,
        case.asymmetric,
    )


ORDER = (
    "x",
    "x_scale",
    "x_zero",
    "weight",
    "factors",
    "weight_scale",
    "weight_sum",
    "bias",
    "other",
    "y",
    "workspace",
)


class LinearOperands(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ORDER)


class LinearGeometry(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int)
            for name in ("rows", "outputs", "x_bytes", "weight_bytes", "slices", "group_slices")
        ),
        ("group_inverse", ctypes.c_uint32),
        *(
            (name, ctypes.c_int)
            for name in ("row_scales", "row_tiles", "column_tiles", "splits", "split_slices")
        ),
        ("type", ctypes.c_int),
        ("ending", ctypes.c_int),
        ("grouped", ctypes.c_bool),
        ("asymmetric", ctypes.c_bool),
        ("factor", ctypes.c_float),
    )


class LinearPlan(ctypes.Structure):
    _fields_ = (
        ("problem", LinearProblem),
        ("geometry", LinearGeometry),
        ("scales", ctypes.c_int),
        ("decodes", ctypes.c_bool),
        ("workspace_bytes", ctypes.c_size_t),
    )


class EmulatedLinear:
    def __init__(self, build: Path) -> None:
        self.library = ctypes.CDLL(str(build / "librotexport_emulated_kernels.so"))

    def plan(self, problem: LinearProblem, multiprocessors: int = 1) -> tuple[LinearPlan, int]:
        """Return the plan, and the most workspace that as many rows or fewer need."""
        plan, largest = LinearPlan(), ctypes.c_size_t()
        call(
            self.library.emulated_quantized_linear_plan,
            ctypes.byref(problem),
            multiprocessors,
            ctypes.byref(plan),
            ctypes.byref(largest),
            error=EmulatorError,
        )
        return plan, largest.value

    def run(self, operands: Operands, multiprocessors: int = 1, schedule: int = 0) -> np.ndarray:
        """Return y [rows, outputs]; the plan is that for a device of so many multiprocessors."""
        case = operands.case
        arrays = {name: np.ascontiguousarray(array) for name, array in operands.inputs().items()}
        if case.ending:
            arrays["other"] = arrays.pop("residual" if case.ending == "Residual" else "gate")
        y = np.empty((case.rows, case.outputs), case.out)
        packed = LinearOperands(**{name: array.ctypes.data for name, array in arrays.items()})
        call(
            self.library.emulated_quantized_linear,
            ctypes.byref(problem_of(case)),
            multiprocessors,
            ctypes.byref(packed),
            ctypes.c_void_p(y.ctypes.data),
            ctypes.c_uint64(schedule),
            error=EmulatorError,
        )
        return y
