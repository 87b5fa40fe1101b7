"""Builds the plugin library with CMake and nvcc, and reads what the assembler says about its kernels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rotexport.errors import TargetError

SOURCES: Final = Path(__file__).resolve().parents[2] / "plugins"
ALL_ARCHITECTURES: Final = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_80")
_KNOWN: Final = frozenset({"80", "86", "87", "89", "90", "90a", "100", "100a", "103", "110", "120", "121"})


@dataclass(frozen=True)
class KernelResources:
    """What one kernel takes of a multiprocessor, as ptxas reports it."""

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class BuildReport:
    """The library that was built, and the resources of every kernel in it."""

    library: Path
    resources: list[KernelResources]


def build_library(
    architectures: Sequence[str] = ALL_ARCHITECTURES,
    *,
    tensorrt_root: Path | None = None,
    build: Path | None = None,
) -> BuildReport:
    """Build librotexport_plugins_trtN.so, N the major version of the headers under `tensorrt_root`.

    Args:
        architectures: `sm_NN` for machine code, `compute_NN` for PTX.
        tensorrt_root: the directory that holds TensorRT's headers or its include/; default $TENSORRT_ROOT.
        build: where to build; default plugins/build/cuda beside the sources.

    Raises:
        TargetError: an architecture is unknown, the sources, the compiler or the headers are missing, or the
            build failed (a kernel that spills registers fails it).

    """
    numbers = [_cmake_architecture(architecture) for architecture in architectures]
    if not numbers:
        raise TargetError("no architecture to build for: name at least one, as sm_90a")
    if not (SOURCES / "CMakeLists.txt").is_file():
        raise TargetError(
            f"the plugins' sources are not at {SOURCES}: build them from a checkout of rotexport"
        )
    nvcc = _find_nvcc()
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            raise TargetError(f"{tool} was not found on the PATH: install it (pip install {tool})")
    headers = _find_headers(tensorrt_root)
    build = build or SOURCES / "build" / "cuda"
    configure = [
        *("cmake", "-G", "Ninja", "-S", str(SOURCES), "-B", str(build), "-DROTEXPORT_DEVICE=cuda"),
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DTENSORRT_ROOT={headers}",
        f"-DROTEXPORT_ARCHITECTURES={';'.join(numbers)}",
    ]
    _run(configure)
    _run(["cmake", "--build", str(build)])
    library = next(iter(sorted(build.glob("librotexport_plugins_trt*.so"))), None)
    if library is None:
        raise TargetError(f"the build left no library in {build}")
    return BuildReport(library, _read_resources(build))


def built_library() -> Path:
    """Return the library that `build_library` left where it builds by default.

    Raises:
        TargetError: there is none.

    """
    found = sorted((SOURCES / "build" / "cuda").glob("librotexport_plugins_trt*.so"))
    if not found:
        raise TargetError("no plugin library has been built here: run `rotexport plugins build`, or name one")
    return found[-1]


def _cmake_architecture(name: str) -> str:
    match = re.fullmatch(r"(sm|compute)_(\d+a?)", name)
    if match is None or match[2] not in _KNOWN:
        known = ", ".join(f"sm_{number}" for number in sorted(_KNOWN, key=lambda n: (len(n.rstrip("a")), n)))
        raise TargetError(f"architecture '{name}': the kernels build for {known}, or compute_NN for PTX")
    return f"{match[2]}-virtual" if match[1] == "compute" else match[2]


def _find_nvcc() -> str:
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return candidate
    raise TargetError(
        "nvcc was not found: install the CUDA toolkit and put nvcc on the PATH, or set CUDACXX to it"
    )


def _find_headers(root: Path | None) -> Path:
    named = root or (Path(os.environ["TENSORRT_ROOT"]) if "TENSORRT_ROOT" in os.environ else None)
    if named is None:
        raise TargetError("TensorRT's headers are needed: set TENSORRT_ROOT to the directory that holds them")
    for folder in (named, named / "include", named / "include" / "x86_64-linux-gnu"):
        if (folder / "NvInferRuntime.h").is_file():
            return folder.resolve()
    raise TargetError(f"TENSORRT_ROOT is '{named}', but neither it nor its include/ holds NvInferRuntime.h")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise TargetError(f"'{' '.join(command[:3])} ...' failed:\n{tail}")


def _read_resources(build: Path) -> list[KernelResources]:
    records = [
        record for path in build.rglob("*.resources.json") for record in json.loads(path.read_text("utf-8"))
    ]
    resources = [KernelResources(**record) for record in records]
    return sorted(resources, key=lambda resource: (resource.kernel, resource.architecture))
