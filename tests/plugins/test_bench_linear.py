"""The GPU script of QuantizedLinear: its judgement, tried on the CPU with the emulator in the GPU's place."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import quantized_linear as bench
import torch
from c_calls import call
from emulated_linear import LinearOperands
from gpu_linear import OPERANDS, Launch, Linear, Operands

CPU = torch.device("cpu")
NUMPY = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.float32: np.float32}


class OnEmulator:
    """Kernels as the script calls them. `spoil` changes y after the kernel has run."""

    def __init__(self, emulated: Path, spoil: float = 0.0) -> None:
        self.library = ctypes.CDLL(str(emulated / "librotexport_emulated_kernels.so"))
        self.spoil = spoil

    def prepare(self, operands: Operands) -> Launch:
        linear = operands.linear
        tensors = {name: tensor.contiguous() for name, tensor in operands.packed().items()}
        packed = LinearOperands(**{name: tensor.data_ptr() for name, tensor in tensors.items()})
        y = np.empty((linear.rows, linear.outputs), NUMPY[linear.dtype])
        call(
            self.library.emulated_quantized_linear,
            ctypes.byref(linear.problem()),
            1,
            ctypes.byref(packed),
            ctypes.c_void_p(y.ctypes.data),
            ctypes.c_uint64(0),
        )
        values = torch.from_numpy(y.astype(np.float32))
        values[0, 0] += self.spoil
        return Launch(values.to(linear.dtype), lambda: None)


def test_operands_are_those_of_the_kernels() -> None:
    assert tuple(name for name, _ in LinearOperands._fields_) == OPERANDS


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
@pytest.mark.parametrize(
    "linear",
    [
        Linear("W8A8", 3, 160, 7),
        Linear("W4A8", 18, 160, 7, group=64, two_level=True),
        Linear("W4A4", 3, 160, 8, group=32, row_groups=True),
        Linear("W4A8", 2, 160, 7, ending="gate"),
        Linear("W8A8", 2, 160, 7, ending="residual"),
    ],
    ids=str,
)
def test_check_accepts_what_is_right(emulated: Path, linear: Linear, dtype: torch.dtype) -> None:
    assert bench.check(OnEmulator(emulated), replace(linear, dtype=dtype).operands(CPU)) <= 1


@pytest.mark.parametrize("spoil", [0.01, float("nan")])
def test_check_rejects_what_is_wrong(emulated: Path, spoil: float) -> None:
    linear = Linear("W4A8", 3, 160, 7, dtype=torch.float32)
    assert not bench.check(OnEmulator(emulated, spoil), linear.operands(CPU)) <= 1


def test_every_kernel_is_checked() -> None:
    """11 formats and scales, for few and for many rows."""
    kinds = {
        (one.form, one.group is None, one.two_level, one.row_groups, one.rows <= 16)
        for one in bench.checked()
    }
    assert len(kinds) == 22


def result(**changed: object) -> bench.Result:
    seconds = {"copy": 0.5e-3, "float16": 1.0, "int8": 1.0, "in front": 0.01, "product": 1.0}
    fields = {"name": "one", "rows": 4096, "shape": bench.LARGE, "scales": "channel", "form": "W8A8"}
    return bench.Result(**(fields | {"weight_bytes": 2**30, "seconds": seconds} | changed))


def test_shortfalls_name_what_is_slow() -> None:
    good = {"copy": 0.5e-3, "float16": 4.0, "int8": 1.0, "in front": 0.01, "product": 1.0}
    assert not list(bench.shortfalls(result(seconds=good)))
    assert list(bench.shortfalls(result(seconds=good | {"int8": 0.8, "in front": 0.1}))) == [
        "one: 0.80 of the best int8 product, must be 0.90",
        "one: quantizing in front takes 10% of the product, at most 8%",
    ]
    assert list(bench.shortfalls(result(form="W4A8", scales="group", seconds=good | {"float16": 1.0}))) == [
        "one: 1.00 times cuBLAS float16, must be 1.10"
    ]
    few = result(form="W4A8", rows=4, seconds={"copy": 1.0, "float16": 2.0, "product": 1.0})
    assert list(bench.shortfalls(few)) == [
        "one: 2.00 times cuBLAS float16, must be 2.80",
        "one: 0.50 of the copy's bandwidth, must be 0.75",
    ]


def test_the_table_has_a_line_per_result() -> None:
    lines = bench.table([result(), result(rows=1, form="W4A8", seconds=result().seconds | {"copy": 2.0})])
    assert lines.splitlines()[2] == "| one | 1000000.0 | 1.00 | 1.00 |  |"
    assert lines.splitlines()[3].endswith("| 1.00 |")
