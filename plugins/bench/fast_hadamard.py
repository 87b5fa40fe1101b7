"""Checks and measures FastHadamard on the GPU of this machine (run.sh sets everything up).

Correctness: fresh random inputs, outputs poisoned before each run, float64 references, the error bound of
kernels/fast_hadamard.h. Speed: medians over CUDA events, 2^28 elements (a gigabyte, far past any L2) in
buffers that take turns, next to a device-to-device copy, PyTorch's product with H, and public fast Hadamard
kernels where they are installed, all in one run. Writes bench/results/GPU-DATE-fast-hadamard.json. Exit
status 1 when a result is wrong, 2 when one is slower than it must be.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gpu_kernels import CLIP, OUTPUTS, Kernels, Transform
from measuring import EPSILON, Benchmark, median_seconds

ELEMENTS = 2**28
BUFFERS = 3
LONGEST_DENSE = 8192
PUBLIC = ("fast_hadamard_transform", "faster_hadamard_transform")

# Fraction of the copy's bandwidth that each length must reach in float16 and bfloat16.
MUST_REACH = {
    **{Transform(1, 2**k): 0.90 for k in range(6, 14)},
    Transform(12, 128): 0.90,
    Transform(1, 16384): 0.85,
    Transform(28, 512): 0.85,
    Transform(36, 16): 0.85,
    Transform(76, 64): 0.85,
    Transform(1, 32768): 0.75,
    Transform(172, 64): 0.70,
}
FASTER_THAN_COPY_WHEN_QUANTIZING = [t for t in MUST_REACH if t.length <= 16384 and t.base <= 76]
CHECKED = [
    *MUST_REACH,
    Transform(1, 4),
    Transform(1, 16),
    Transform(12, 1),
    Transform(20, 2),
    Transform(924, 32),
]


def dense(transform: Transform, device: torch.device) -> torch.Tensor:
    """Return H / sqrt(n) in float64."""
    power = torch.ones((1, 1), dtype=torch.float64, device=device)
    while len(power) < transform.power:
        power = torch.cat([torch.cat([power, power], 1), torch.cat([power, -power], 1)])
    return torch.kron(transform.table(device).double(), power) / math.sqrt(transform.length)


def reference(transform: Transform, x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return the transform in float64: factor by factor, which a dense H of order 32,768 would not allow."""
    blocks = (x.double() * signs.double()).reshape(-1, transform.base, transform.power)
    blocks = torch.einsum("nab,ai->nib", blocks, transform.table(x.device).double())
    stride = 1
    while stride < transform.power:
        pairs = blocks.reshape(len(blocks), transform.base, -1, 2, stride)
        blocks = torch.stack(
            [pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2
        )
        blocks = blocks.reshape(len(pairs), transform.base, transform.power)
        stride *= 2
    return blocks.reshape(x.shape) / transform.length**0.5


def unpack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return int4 codes from bytes, the even element in the low nibble."""
    pairs = torch.stack([codes & 15, (codes >> 4) & 15], dim=-1).reshape(len(codes), -1)
    return torch.where(pairs > 7, pairs - 16, pairs)


def random_inputs(
    transform: Transform, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [rows, n] and signs [n]."""
    x = torch.randn(rows, transform.length, device=device).to(dtype)
    signs = torch.where(torch.rand(transform.length, device=device) < 0.5, -1.0, 1.0).to(dtype)
    return x, signs


def check(kernels: Kernels, x: torch.Tensor, signs: torch.Tensor, transform: Transform, output: str) -> float:
    """Return the largest error as a fraction of the allowed one; above 1, or NaN, is wrong."""
    launch = kernels.prepare(transform, x, signs, output)
    launch.run()
    exact = reference(transform, x, signs)
    order = max(16, transform.base)
    sums = x.double().abs().sum(1, keepdim=True) / math.sqrt(transform.length)
    bound = (2 * order + math.log2(transform.length) + 4) * 2.0**-24 * sums
    if output == "same":
        allowed = bound * (1 + EPSILON[x.dtype]) + EPSILON[x.dtype] * exact.abs() + 2.0**-25
        return float(((launch.y.double() - exact).abs() / allowed).max().item())
    largest = 127 if output == "int8" else 7
    codes = unpack_nibbles(launch.y) if output == "int4" else launch.y
    exact_scale = exact.abs().amax(1, keepdim=True) * CLIP / largest
    scale_error = (launch.scale - exact_scale).abs() / (bound * CLIP / largest + 2.0**-20 * exact_scale)
    quotient = (exact / launch.scale).clamp(-largest - 1, largest)
    code_error = (codes - quotient).abs() / (0.5 + bound / launch.scale + 2.0**-20 * quotient.abs())
    return float(torch.cat([scale_error.flatten(), code_error.flatten()]).max().item())


def public_kernels() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the public fast Hadamard transforms that are installed; powers of two only."""
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for module in PUBLIC:
        try:
            found[module] = importlib.import_module(module).hadamard_transform
        except ImportError:
            continue
    return found


@dataclass(frozen=True)
class Result:
    """Median seconds of one length and type: of the copy, of each output, and of what others offer."""

    length: str
    type: str
    bytes: int  # that a copy reads and writes
    seconds: dict[str, float]

    def of_copy(self, what: str) -> float:
        """Return how many times faster than the copy `what` is."""
        return self.seconds["copy"] / self.seconds[what]


def measure_all(kernels: Kernels) -> Iterator[Result]:
    """Measure every length that must reach something."""
    for transform, dtype in itertools.product(MUST_REACH, (torch.float16, torch.bfloat16)):
        yield measure(kernels, transform, dtype)


def measure(kernels: Kernels, transform: Transform, dtype: torch.dtype) -> Result:
    """Measure one length and type."""
    device = torch.device("cuda")
    rows = ELEMENTS // transform.length
    inputs = [random_inputs(transform, rows, dtype, device)[0] for _ in range(BUFFERS)]
    signs = random_inputs(transform, 1, dtype, device)[1]
    pairs = [(x, torch.empty_like(x)) for x in inputs]
    copies = [partial(y.copy_, x) for x, y in pairs]
    seconds = {"copy": median_seconds(copies)}
    for output in OUTPUTS:
        seconds[output] = median_seconds([kernels.prepare(transform, x, signs, output).run for x in inputs])
    if transform.length <= LONGEST_DENSE:
        h = dense(transform, device).to(dtype)
        seconds["torch.matmul"] = median_seconds([partial(torch.matmul, x, h, out=y) for x, y in pairs])
    if transform.base == 1:
        for name, function in public_kernels().items():
            try:
                seconds[name] = median_seconds([partial(function, x) for x in inputs])
            except (RuntimeError, ValueError) as error:
                print(f"{name} does not take length {transform.length}: {error}", file=sys.stderr)
    seconds["copy, again"] = median_seconds(copies)  # its distance from the first is the noise
    copied = 2 * rows * transform.length * dtype.itemsize
    return Result(str(transform), str(dtype).removeprefix("torch."), copied, seconds)


def shortfalls(result: Result, transform: Transform) -> Iterator[str]:
    """Yield in words what a result misses."""
    name = f"{transform} {result.type}"
    if result.of_copy("same") < MUST_REACH[transform]:
        yield f"{name}: {result.of_copy('same'):.2f} of the copy, must be {MUST_REACH[transform]:.2f}"
    if transform in FASTER_THAN_COPY_WHEN_QUANTIZING:
        for output in ("int8", "int4"):
            if result.of_copy(output) <= 1:
                yield f"{name} to {output}: slower than the copy"
    for public in PUBLIC:
        if result.seconds["same"] > result.seconds.get(public, math.inf):
            yield f"{name}: slower than {public}"


def shortfalls_of_all(results: list[Result]) -> Iterator[str]:
    """Yield in words what results miss."""
    transforms = {str(transform): transform for transform in MUST_REACH}
    for result in results:
        yield from shortfalls(result, transforms[result.length])


def check_all(kernels: Kernels) -> list[str]:
    """Return what is wrong."""
    wrong = []
    for transform, dtype, output in itertools.product(CHECKED, EPSILON, OUTPUTS):
        rows = max(3, min(257, 2**22 // transform.length) | 1)  # odd: the last unit is ragged
        inputs = random_inputs(transform, rows, dtype, torch.device("cuda"))
        error = check(kernels, *inputs, transform, output)
        if not error <= 1:
            wrong.append(f"{transform} {dtype} {output}: {error:.3g} times the allowed error")
    print(f"{len(CHECKED) * len(EPSILON) * len(OUTPUTS)} configurations checked, {len(wrong)} wrong")
    return wrong


def table(results: list[Result]) -> str:
    """Return the results as the Markdown table of plugins/README.md."""
    lines = ["| length | type | of copy | int8 of copy | int4 of copy | TB/s |", "|---|---|---|---|---|---|"]
    for result in results:
        ratios = " | ".join(f"{result.of_copy(output):.2f}" for output in OUTPUTS)
        speed = result.bytes / result.seconds["same"] / 1e12
        lines.append(f"| {result.length} | {result.type} | {ratios} | {speed:.2f} |")
    return "\n".join(lines)


BENCHMARK = Benchmark(
    script=__file__,
    name="fast-hadamard",
    check=lambda library: check_all(Kernels(library)),
    measure=lambda library: measure_all(Kernels(library)),
    table=table,
    shortfalls=shortfalls_of_all,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main(__doc__))
