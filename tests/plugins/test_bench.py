"""The GPU script's judgement, tried on the CPU with the emulator in the GPU's place."""

from __future__ import annotations

from pathlib import Path

import fast_hadamard as bench
import ml_dtypes
import numpy as np
import pytest
import torch
from emulated import EmulatedKernels
from gpu_kernels import CLIP, OUTPUTS, Launch, Transform

CPU = torch.device("cpu")
NUMPY = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.float32: np.float32}


class OnEmulator:
    """Kernels as the script calls them. `spoil` changes y after the kernel has run."""

    def __init__(self, emulated: Path, spoil: float = 0.0) -> None:
        self.kernels = EmulatedKernels(emulated)
        self.spoil = spoil

    def prepare(self, transform: Transform, x: torch.Tensor, signs: torch.Tensor, output: str) -> Launch:
        arrays = [t.float().numpy().astype(NUMPY[x.dtype]) for t in (x, signs)]
        base = transform.table(CPU).numpy()
        y, scale = self.kernels.fast_hadamard(*arrays, base, transform.power, output, clip=CLIP)
        values = (
            torch.from_numpy(y.astype(np.float32)).to(x.dtype) if output == "same" else torch.from_numpy(y)
        )
        values[0, 0] = (values[0, 0] + self.spoil).to(values.dtype)
        return Launch(values, torch.from_numpy(scale), lambda: None)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", NUMPY, ids=str)
@pytest.mark.parametrize("transform", [Transform(1, 64), Transform(12, 8), Transform(20, 2)], ids=str)
def test_check_accepts_what_is_right(
    emulated: Path, transform: Transform, dtype: torch.dtype, output: str
) -> None:
    inputs = bench.random_inputs(transform, 5, dtype, CPU)
    assert bench.check(OnEmulator(emulated), *inputs, transform, output) <= 1


@pytest.mark.parametrize(
    ("output", "spoil"), [("same", 0.01), ("same", float("nan")), ("int8", 2), ("int4", 1)]
)
def test_check_rejects_what_is_wrong(emulated: Path, output: str, spoil: float) -> None:
    inputs = bench.random_inputs(Transform(1, 64), 5, torch.float32, CPU)
    error = bench.check(OnEmulator(emulated, spoil), *inputs, Transform(1, 64), output)
    assert not error <= 1


def test_references_agree() -> None:
    transform = Transform(12, 8)
    x, signs = bench.random_inputs(transform, 3, torch.float32, CPU)
    dense = (x.double() * signs.double()) @ bench.dense(transform, CPU)
    torch.testing.assert_close(bench.reference(transform, x, signs), dense)


def test_shortfalls_name_what_is_slow() -> None:
    transform = Transform(1, 64)
    good = {"copy": 1.0, "same": 1.1, "int8": 0.9, "int4": 0.8}
    assert not list(bench.shortfalls(bench.Result("64", "float16", 1, good), transform))
    slow = good | {"same": 1.2, "int8": 1.0, "fast_hadamard_transform": 1.15}
    assert list(bench.shortfalls(bench.Result("64", "float16", 1, slow), transform)) == [
        "64 float16: 0.83 of the copy, must be 0.90",
        "64 float16 to int8: slower than the copy",
        "64 float16: slower than fast_hadamard_transform",
    ]


def test_the_table_has_a_line_per_result() -> None:
    result = bench.Result(
        "12*128", "float16", 4 * 10**12, {"copy": 1.0, "same": 1.25, "int8": 0.8, "int4": 0.5}
    )
    assert bench.table([result]).splitlines()[-1] == "| 12*128 | float16 | 0.80 | 1.25 | 2.00 | 3.20 |"
