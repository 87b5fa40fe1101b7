"""Builds the kernels for this machine's GPU and calls them on PyTorch tensors."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from c_calls import call
from structures import HadamardProblem

from rotexport.transforms.orders import base_matrix

PLUGINS = Path(__file__).resolve().parents[1]
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
CLIP = 0.9
OUTPUTS = {"same": 0, "int8": 1, "int4": 2}


class _Operands(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("x", "signs", "base", "y", "scale", "workspace"))


def build(directory: Path) -> Path:
    """Build the kernels for the current GPU and return the library.

    Raises:
        SystemExit: CMake or the compiler failed; the message is the end of their output.

    """
    major, minor = torch.cuda.get_device_capability()
    if major == 9 and not (os.environ.get("CUTLASS_ROOT") or (PLUGINS / "build" / "cutlass").is_dir()):
        print("without CUTLASS's headers (tools/fetch_cutlass_headers.py) many int8 rows run on mma.sync")
    architecture = f"{major}{minor}" + ("a" if major == 9 else "")
    configure = [
        *("cmake", "-G", "Ninja", "-S", str(PLUGINS), "-B", str(directory)),
        *("-DROTEXPORT_DEVICE=cuda", "-DROTEXPORT_BENCH=ON", f"-DROTEXPORT_ARCHITECTURES={architecture}"),
    ]
    for command in (configure, ["cmake", "--build", str(directory), "--target", "rotexport_bench"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit("\n".join((done.stdout + done.stderr).splitlines()[-30:]))
    return directory / "librotexport_bench.so"


@dataclass(frozen=True)
class Transform:
    """One length base * power, with its tables on the GPU."""

    base: int
    power: int

    @property
    def length(self) -> int:
        """The block length n."""
        return self.base * self.power

    def __str__(self) -> str:
        return str(self.power) if self.base == 1 else f"{self.base}*{self.power}"

    def table(self, device: torch.device) -> torch.Tensor:
        """Return the base matrix, int8 [m, m]."""
        return torch.from_numpy(np.array(base_matrix(self.base))).to(device)


@dataclass(frozen=True)
class Launch:
    """A kernel bound to its operands: `run` fills `y` and, when quantizing, `scale`."""

    y: torch.Tensor
    scale: torch.Tensor
    run: Callable[[], None]


class Kernels:
    """The kernels of a built library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def prepare(self, transform: Transform, x: torch.Tensor, signs: torch.Tensor, output: str) -> Launch:
        """Bind the kernel to x [rows, D] and to new outputs, which are poisoned."""
        rows, row = x.shape
        y = {
            "same": lambda: torch.full_like(x, torch.nan),
            "int8": lambda: torch.full((rows, row), -77, dtype=torch.int8, device=x.device),
            "int4": lambda: torch.full((rows, row // 2), -77, dtype=torch.int8, device=x.device),
        }[output]()
        scale = torch.full((rows, 1), torch.nan, device=x.device)
        problem = HadamardProblem(
            TYPES[x.dtype], OUTPUTS[output], rows, row, transform.base, transform.power, CLIP
        )
        workspace_bytes = ctypes.c_size_t()
        call(self._library.fast_hadamard_plan, ctypes.byref(problem), ctypes.byref(workspace_bytes))
        workspace = torch.empty(max(workspace_bytes.value, 1), dtype=torch.uint8, device=x.device)
        tensors = (x, signs, transform.table(x.device), y, scale, workspace)
        return Launch(y, scale, partial(self._launch, problem, tensors))

    def _launch(self, problem: HadamardProblem, tensors: tuple[torch.Tensor, ...]) -> None:
        operands = _Operands(*(tensor.data_ptr() for tensor in tensors))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        call(self._library.fast_hadamard_run, ctypes.byref(problem), ctypes.byref(operands), stream)
