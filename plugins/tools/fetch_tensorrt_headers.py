"""Fetch TensorRT 10.14's headers from the package that carries them, into plugins/build/tensorrt.

For machines that have no TensorRT and only compile. Prints the directory, to be used as TENSORRT_ROOT.
"""

from __future__ import annotations

from pathlib import Path

from wheel_headers import Headers

TENSORRT = Headers("kernel-lens==2.0.1", "kernel_lens/include/tensorrt/", "NvInferRuntime.h")

if __name__ == "__main__":
    print(TENSORRT.fetch(Path(__file__).parents[1] / "build" / "tensorrt"))
