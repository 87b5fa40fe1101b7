"""Build one engine per compute capability, each in a child process, on a machine with or without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import onnx

from rotexport.errors import OutputError, TargetError
from rotexport.plugins import test_library
from rotexport.targets import builder_process
from rotexport.targets.acceptance import Refusal, split_calls
from rotexport.targets.capabilities import MODULES
from rotexport.targets.inlining import inline
from rotexport.targets.joining import join_rotations
from rotexport.targets.layers import Kernel, Layer, assert_kernels, parse_layers
from rotexport.targets.lint import lint
from rotexport.targets.lowering import lower
from rotexport.targets.profiles import Profiles, Range, Shapes, input_shapes

_TAIL: Final = 8  # lines of a failed builder's output that go into the error
_ALLOCATOR: Final = ":".join(  # glibc: what is freed stays, in huge pages; a builder allocates by the million
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "trim_threshold": 1 << 33,
        "mmap_threshold": 1 << 25,
        "top_pad": 1 << 26,
        "hugetlb": 1,
        "tcache_count": 65535,
        "mxfast": 160,
    }.items()
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class EngineReport:
    """One plan: where it is, what it took, which layers the builder made, and what no kernel of ours took."""

    target: str
    gpu: str
    path: Path
    size: int
    seconds: float
    layers: tuple[Layer, ...]
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class EngineRequest:
    """What to build: a saved model for GPUs (`sm89`) and shapes, and the kernel each MatMul must become.

    `plugins` is a library of kernels. Nodes that they take stay, for the builder to find them; others are
    expanded.
    """

    model: Path
    target: str
    gpus: tuple[str, ...]
    profiles: Profiles
    kernels: Mapping[str, Kernel]
    plugins: Path | None = None


def build_engines(request: EngineRequest, directory: Path, progress: Progress) -> list[EngineReport]:
    """Build `directory/<target>-<gpu>.plan` for every asked GPU; `progress` hears each name first.

    Args:
        request: what to build.
        directory: made if it is missing.
        progress: called with the name of the engine about to be built.

    Raises:
        TargetError: the graph holds what the builder runs wrongly, a builder fails or crashes, or a product
            became another kernel than `request.kernels` says.
        OutputError: the directory cannot be written.

    """
    model = onnx.load(str(request.model), load_external_data=False)
    if request.plugins is None:  # kernels of ours take each rotation as it is
        model = join_rotations(model, request.model.parent)
    ranges = _ranges(request)
    kept, refused = _calls(request, model, ranges)
    model = inline(model, request.model.parent, kept)
    lint(model)
    shapes = [input_shapes(model, one) for one in ranges]
    bodies = {refusal.node for refusal in refused}
    request = replace(request, kernels={n: k for n, k in request.kernels.items() if n not in bodies})
    lowered = request.model.with_suffix(f".{request.target}.onnx")  # beside it, so that the weights are found
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lowered.write_bytes(lower(model).SerializeToString())
        reports = []
        for gpu in request.gpus:
            name = f"{request.target}-{gpu}"
            progress(name)
            report = _build(lowered, directory / f"{name}.plan", request, gpu, shapes)
            reports.append(replace(report, refused=tuple(refused)))
        return reports
    except OSError as error:
        raise OutputError(f"cannot write engines to '{directory}': {error.strerror}") from error
    finally:
        lowered.unlink(missing_ok=True)


def _ranges(request: EngineRequest) -> list[dict[str, Range]]:
    """One profile for TensorRT-RTX, which specializes kernels as it meets shapes; two for TensorRT."""
    limits = request.profiles
    return [limits.whole()] if request.target == "tensorrt-rtx" else limits.split()


def _calls(
    request: EngineRequest, model: onnx.ModelProto, ranges: list[dict[str, Range]]
) -> tuple[list[str], list[Refusal]]:
    """Return the names of the nodes that kernels take, and the calls that they do not."""
    if request.plugins is None:
        return [], []
    provided = {creator.name for creator in test_library(request.plugins)}
    return split_calls(model, provided, request.plugins, ranges)


def _build(model: Path, plan: Path, request: EngineRequest, gpu: str, profiles: list[Shapes]) -> EngineReport:
    begin = time.perf_counter()
    temporary = plan.with_suffix(".partial")
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "layers"
        orders = {
            "module": MODULES[request.target],
            "model": str(model),
            "plan": str(temporary),
            "layers": str(log),
            "compute_capability": gpu.upper() if request.target == "tensorrt-rtx" else None,
            "profiles": profiles,
            "plugins": str(request.plugins) if request.plugins else None,
        }
        try:
            _run(orders, Path(scratch), plan.stem)
            layers = parse_layers(log.read_text())
            assert_kernels(layers, request.kernels, plan.stem)
            temporary.rename(plan)
        finally:
            temporary.unlink(missing_ok=True)
    return EngineReport(
        request.target, gpu, plan, plan.stat().st_size, time.perf_counter() - begin, tuple(layers)
    )


def _run(orders: Mapping[str, object], scratch: Path, name: str) -> None:
    file, log = scratch / "request.json", scratch / "log"
    file.write_text(json.dumps(orders))
    with log.open("wb") as output:
        command = [sys.executable, str(builder_process.__file__), str(file)]
        environment = {"GLIBC_TUNABLES": _ALLOCATOR, **os.environ}
        status = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if status:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        how = f"ended by signal {-status}" if status < 0 else "failed"
        said = "\n".join(f"  {line}" for line in lines[-_TAIL:]) or "  (it said nothing)"
        raise TargetError(f"the builder of {name} {how}; it said:\n{said}")
