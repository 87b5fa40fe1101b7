"""What this machine has: versions, GPUs, and which targets work here or why they do not."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from typing import Final

from rotexport.errors import TargetError
from rotexport.targets.capabilities import MODULES, TARGETS

TESTED: Final = {"onnxruntime": "1.31.1", "tensorrt-rtx": "1.7.1.116"}
PACKAGES: Final = (
    "torch",
    "transformers",
    "onnx",
    "onnx-graphsurgeon",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx",
    "tensorrt",
    "gguf",
)
_QUERY: Final = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")

Query = Callable[[], str]


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine; `capability` is written as targets name it (`sm89`), `memory` in MiB."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class TargetStatus:
    """Whether engines of a target can be built here; `reason` is empty when there is nothing to say."""

    target: str
    works: bool
    reason: str = ""


@dataclass(frozen=True)
class Examination:
    """Versions by package (None: not installed), GPUs, and the state of every target."""

    python: str
    packages: dict[str, str | None]
    gpus: tuple[Gpu, ...]
    targets: tuple[TargetStatus, ...]

    @property
    def text(self) -> str:
        """The examination as lines for a terminal."""
        lines = [f"{'python':<18} {self.python}"]
        lines += [f"{name:<18} {version or 'not installed'}" for name, version in self.packages.items()]
        lines += [f"{'gpu':<18} {g.name}, {g.capability}, {g.memory} MiB" for g in self.gpus]
        lines += [] if self.gpus else [f"{'gpu':<18} none found"]
        for status in self.targets:
            state = "works" if status.works else "does not work"
            lines.append(
                f"{'target ' + status.target:<18}  {state}{': ' + status.reason if status.reason else ''}"
            )
        return "\n".join(lines)


def nvidia_smi() -> str:
    """Return what the driver's tool says about GPUs, or nothing where it is missing or fails."""
    try:
        return subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def examine(query: Query = nvidia_smi) -> Examination:
    """Look at this machine; `query` returns the GPU table as `nvidia-smi` prints it."""
    packages = {name: _version(name) for name in PACKAGES}
    gpus = find_gpus(query)
    targets = tuple(_status(target, packages, gpus) for target in TARGETS)
    return Examination(platform.python_version(), packages, gpus, targets)


def find_gpus(query: Query = nvidia_smi) -> tuple[Gpu, ...]:
    """Return the GPUs of this machine."""
    rows = [[field.strip() for field in line.split(",")] for line in query().splitlines()]
    return tuple(
        Gpu(row[0], f"sm{row[1].replace('.', '')}", int(row[2]))
        for row in rows
        if len(row) == 3 and row[2].isdigit()
    )


def require(target: str, gpus: Sequence[str], query: Query = nvidia_smi) -> None:
    """Raise TargetError, with what is missing, when engines for these GPUs cannot be built here."""
    packages = {name: _version(name) for name in PACKAGES}
    present = find_gpus(query) if target == "tensorrt" else ()
    status = _status(target, packages, present)
    if not status.works:
        raise TargetError(f"target {target} does not work here: {status.reason}")
    absent = sorted(set(gpus) - {gpu.capability for gpu in present}) if target == "tensorrt" else []
    if absent:
        raise TargetError(
            f"target tensorrt builds for the GPU present ({present[0].capability}), "
            f"not for {', '.join(absent)}; use target tensorrt-rtx, or a machine with that GPU"
        )


def _status(target: str, packages: dict[str, str | None], gpus: Sequence[Gpu]) -> TargetStatus:
    if target == "onnx":
        version = packages["onnxruntime"] or packages["onnxruntime-gpu"]
        return _tested(target, "onnxruntime", version) if version else _missing(target, "onnxruntime")
    if packages[target] is None or util.find_spec(MODULES[target]) is None:
        return _missing(target, target)
    if target == "tensorrt" and not gpus:
        return TargetStatus(
            target, False, "TensorRT builds only for a GPU that is present, and none was found"
        )
    return _tested(target, target, packages[target])


def _missing(target: str, package: str) -> TargetStatus:
    extra = "gpu" if target == "tensorrt" else "cpu"
    return TargetStatus(target, False, f"{package} is not installed: pip install 'rotexport[{extra}]'")


def _tested(target: str, package: str, version: str | None) -> TargetStatus:
    tested = TESTED.get(package)
    if tested is None:
        return TargetStatus(target, True, "this path has not been run by its authors")
    return TargetStatus(target, True, "" if version == tested else f"tested with {package} {tested} only")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
