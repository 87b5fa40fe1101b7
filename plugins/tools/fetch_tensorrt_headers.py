"""Fetch TensorRT 10.14's headers from the package that carries them, into plugins/build/tensorrt.

For machines that have no TensorRT and only compile. Prints the directory, to be used as TENSORRT_ROOT.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "kernel-lens==2.0.1"
INSIDE = "kernel_lens/include/tensorrt/"


def fetch(target: Path) -> Path:
    """Download the wheel with pip and unpack the headers; returns at once when they are there."""
    if (target / "NvInferRuntime.h").is_file():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE],
            check=True,
        )
        wheel = next(Path(scratch).glob("*.whl"))
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(INSIDE) and name.endswith(".h"):
                    (target / Path(name).name).write_bytes(archive.read(name))
    if not (target / "NvInferRuntime.h").is_file():
        raise SystemExit(f"{PACKAGE} holds no TensorRT headers under {INSIDE}")
    return target


if __name__ == "__main__":
    print(fetch(Path(__file__).parents[1] / "build" / "tensorrt"))
