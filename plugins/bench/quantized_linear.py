"""Checks and measures QuantizedLinear on the GPU of this machine (run.sh sets everything up).

Correctness: random codes, poisoned results, integer sums in float64, the error bound of
kernels/quantized_linear.h. Speed: medians over CUDA events, weights in buffers that take turns and together
pass any L2, next to PyTorch's float16 product (cuBLAS), its int8 product with the usual and with a large
cuBLASLt workspace, a device-to-device copy, and FastHadamardInt8 in front, all in one run. Writes
bench/results/GPU-DATE-quantized-linear.json. Exit status 1 when a result is wrong, 2 when one is slower than
it must be.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from fast_hadamard import random_inputs
from gpu_kernels import Kernels, Transform
from gpu_linear import ENDINGS, Linear, LinearKernels, Operands
from measuring import EPSILON, Benchmark, median_seconds

TURNING_BYTES = 2**28  # of weights, over all buffers: far past any L2
COPY_BYTES = 2**30
WORKSPACE_KIB = 32 * 1024  # for cuBLASLt

LARGE, SMALL, DOWN = (8192, 28672), (4096, 14336), (14336, 4096)  # inputs, outputs: of 70B and 8B models
SCALES = {"channel": {}, "two-level": {"group": 64, "two_level": True}, "group": {"group": 128}}

# What must be reached: of few rows, times cuBLAS in float16 and the share of the copy's bandwidth; of many,
# times cuBLAS, or the share of the best int8 product; and the share of a product that quantizing may take.
FEW_ROWS = {LARGE: (2.8, 0.75), SMALL: (2.5, 0.60)}
MANY_ROWS = {"channel": 1.3, "two-level": 1.3, "group": 1.1}
OF_INT8 = 0.9
IN_FRONT = {LARGE: 0.08, SMALL: 0.08, DOWN: 0.12}


@dataclass(frozen=True)
class Result:
    """Median seconds of a product and of what it is compared with."""

    name: str
    rows: int
    shape: tuple[int, int]
    scales: str
    form: str
    weight_bytes: int
    seconds: dict[str, float]

    def times(self, other: str) -> float:
        """Return how many times faster than `other` the product is."""
        return self.seconds[other] / self.seconds["product"]

    def of_copy(self) -> float:
        """Return the share of the copy's bandwidth at which weights are read."""
        copied = 2 * COPY_BYTES / self.seconds["copy"]
        return self.weight_bytes / self.seconds["product"] / copied


def checked() -> Iterator[Linear]:
    """Yield every kernel with ragged edges (short last groups, odd rows and columns) and every ending."""
    scales = [
        {},
        {"group": 64, "two_level": True},
        *({"group": group} for group in (32, 96, 256)),
        {"group": 64, "row_groups": True},
    ]
    for form, kind, rows in itertools.product(("W8A8", "W4A8", "W4A4"), scales, (1, 5, 16, 17, 131, 400)):
        if form == "W8A8" and kind.get("two_level"):
            continue
        dtype = list(EPSILON)[rows % 3]
        yield Linear(form, rows, 2336, 391 if rows % 2 else 512, **kind, dtype=dtype)
    for ending, dtype in itertools.product(ENDINGS, EPSILON):  # tiles enough for Hopper's own kernel
        yield Linear("W8A8", 1030, 2320, 8192, ending=ending, dtype=dtype)
        yield Linear("W4A8", 9, 2336, 390, ending=ending, dtype=dtype)


def check(kernels: LinearKernels, operands: Operands) -> float:
    """Return the largest error as a fraction of the allowed one; above 1, or NaN, is wrong."""
    launch = kernels.prepare(operands)
    launch.run()
    (exact, bound), epsilon = operands.reference(), EPSILON[operands.linear.dtype]
    allowed = (1 + epsilon) * bound + epsilon * exact.abs() + 2.0**-25
    return float(((launch.y.double() - exact).abs() / allowed).max().item())


def check_all(kernels: LinearKernels) -> list[str]:
    """Return what is wrong."""
    wrong, count = [], 0
    for linear in checked():
        error = check(kernels, linear.operands(torch.device("cuda")))
        count += 1
        if not error <= 1:
            wrong.append(f"{linear} {linear.dtype}: {error:.3g} times the allowed error")
    print(f"{count} products checked, {len(wrong)} wrong")
    return wrong


def copy_seconds() -> float:
    """Return the time of a device-to-device copy of COPY_BYTES."""
    pairs = [torch.empty((2, COPY_BYTES), dtype=torch.uint8, device="cuda") for _ in range(2)]
    return median_seconds([partial(pair[0].copy_, pair[1]) for pair in pairs])


def float_seconds(linear: Linear) -> float:
    """Return the time of the same product in float16 by cuBLAS, its weights taking turns too."""
    buffers = max(2, TURNING_BYTES // (2 * linear.inputs * linear.outputs))
    x = torch.randn(linear.rows, linear.inputs, dtype=torch.float16, device="cuda")
    y = torch.empty(linear.rows, linear.outputs, dtype=torch.float16, device="cuda")
    weights = [
        torch.randn(linear.outputs, linear.inputs, dtype=torch.float16, device="cuda") for _ in range(buffers)
    ]
    return median_seconds([partial(torch.matmul, x, weight.T, out=y) for weight in weights])


def int8_seconds(linear: Linear) -> float:
    """Return the time of PyTorch's int8 product, without scales."""
    x = torch.randint(-128, 128, (linear.rows, linear.inputs), dtype=torch.int8, device="cuda")
    weight = torch.randint(-128, 128, (linear.outputs, linear.inputs), dtype=torch.int8, device="cuda")
    return median_seconds([partial(torch._int_mm, x, weight.T)])


def int8_seconds_with_workspace(linear: Linear) -> float:
    """Return the same with a large workspace, which cuBLASLt is given when a process begins."""
    command = [sys.executable, __file__, "--int8", str(linear.rows), str(linear.inputs), str(linear.outputs)]
    environment = os.environ | {"CUBLASLT_WORKSPACE_SIZE": str(WORKSPACE_KIB)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def hadamard_seconds(kernels: Kernels, linear: Linear) -> float:
    """Return the time of the Hadamard and quantization in front of the product."""
    base = 28 if linear.inputs % 7 == 0 else 1
    transform = Transform(base, linear.inputs // base)
    buffers = [
        random_inputs(transform, linear.rows, torch.float16, torch.device("cuda"))[0] for _ in range(4)
    ]
    signs = random_inputs(transform, 1, torch.float16, torch.device("cuda"))[1]
    return median_seconds([kernels.prepare(transform, x, signs, "int8").run for x in buffers])


def product_seconds(kernels: LinearKernels, linear: Linear) -> float:
    """Return the time of our product, operands taking turns."""
    buffers = max(2, TURNING_BYTES // linear.weight_bytes)
    device = torch.device("cuda")
    return median_seconds([kernels.prepare(linear.operands(device)).run for _ in range(buffers)])


def measure(library: Path) -> Iterator[Result]:
    """Yield the results, few rows first."""
    kernels, hadamards = LinearKernels(library), Kernels(library)
    copy = copy_seconds()
    cases = [("W4A8", rows, shape) for rows in (1, 4, 16) for shape in FEW_ROWS]
    cases += [(form, 4096, shape) for form in ("W4A8", "W8A8", "W4A4") for shape in IN_FRONT]
    for form, rows, shape in cases:
        plain = Linear(form, rows, *shape)
        others = {"copy": copy, "float16": float_seconds(plain)}
        if rows > 16:
            others["in front"] = hadamard_seconds(hadamards, plain)
        if form == "W8A8":
            others["int8"] = min(int8_seconds(plain), int8_seconds_with_workspace(plain))
        for scales, sizes in SCALES.items():
            if form == "W8A8" and scales == "two-level":
                continue
            linear = Linear(form, rows, *shape, **sizes)
            seconds = others | {"product": product_seconds(kernels, linear)}
            yield Result(str(linear), rows, shape, scales, form, linear.weight_bytes, seconds)
            torch.cuda.empty_cache()


def shortfalls(result: Result) -> Iterator[str]:
    """Yield in words what a result misses."""
    if result.rows <= 16:
        faster, of_copy = FEW_ROWS[result.shape]
        if result.times("float16") < faster:
            yield f"{result.name}: {result.times('float16'):.2f} times cuBLAS float16, must be {faster:.2f}"
        if result.of_copy() < of_copy:
            yield f"{result.name}: {result.of_copy():.2f} of the copy's bandwidth, must be {of_copy:.2f}"
        return
    if result.form == "W4A8" and result.times("float16") < MANY_ROWS[result.scales]:
        yield (
            f"{result.name}: {result.times('float16'):.2f} times cuBLAS float16, "
            f"must be {MANY_ROWS[result.scales]:.2f}"
        )
    if result.form == "W8A8" and result.scales == "channel" and result.times("int8") < OF_INT8:
        yield f"{result.name}: {result.times('int8'):.2f} of the best int8 product, must be {OF_INT8:.2f}"
    share = result.seconds["in front"] / result.seconds["product"]
    if result.scales != "group" and share > IN_FRONT[result.shape]:
        yield (
            f"{result.name}: quantizing in front takes {share:.0%} of the product, "
            f"at most {IN_FRONT[result.shape]:.0%}"
        )


def table(results: list[Result]) -> str:
    """Return the results as the Markdown table of plugins/README.md."""
    lines = ["| product | us | of cuBLAS float16 | of the best int8 | of the copy |", "|---|---|---|---|---|"]
    for result in results:
        int8 = f"{result.times('int8'):.2f}" if "int8" in result.seconds else ""
        copy = f"{result.of_copy():.2f}" if result.rows <= 16 else ""
        microseconds = result.seconds["product"] * 1e6
        lines.append(
            f"| {result.name} | {microseconds:.1f} | {result.times('float16'):.2f} | {int8} | {copy} |"
        )
    return "\n".join(lines)


BENCHMARK = Benchmark(
    script=__file__,
    name="quantized-linear",
    check=lambda library: check_all(LinearKernels(library)),
    measure=measure,
    table=table,
    shortfalls=lambda results: (line for result in results for line in shortfalls(result)),
)


def main() -> int:
    """Run the benchmark, or one measurement of it that needs a process of its own."""
    if sys.argv[1:2] == ["--int8"]:
        print(int8_seconds(Linear("W8A8", *map(int, sys.argv[2:]))))
        return 0
    return BENCHMARK.main(__doc__)


if __name__ == "__main__":
    sys.exit(main())
