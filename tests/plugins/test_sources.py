"""Kernels keep to the device vocabulary, or the emulator would not see what they do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"
SOURCES = sorted(
    path
    for folder in ("kernels", "tensorrt")
    for path in (PLUGINS / folder).iterdir()
    if path.suffix in {".h", ".cpp", ".cu"}
    and path.name not in {"cuda_device.h", "cuda_fp8_device.h", "cuda_warpgroup_device.h"}
)
ONLY_IN_CUDA_DEVICE = re.compile(
    r"\basm\b|<<<|__shared__|threadIdx|blockIdx|blockDim|gridDim|__sync|__shfl|__ballot|\batomic[A-Z]|__ldg"
    r"|\bcudaLaunch|\bprintf\b|\bexit\(|\babort\("
)


def outside_the_vocabulary(text: str) -> list[str]:
    code = re.sub(r"//.*", "", text)
    return ONLY_IN_CUDA_DEVICE.findall(code)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_only_the_device_vocabulary_reaches_the_gpu(source: Path) -> None:
    assert outside_the_vocabulary(source.read_text("utf-8")) == []


def test_the_lint_sees_what_it_forbids() -> None:
    assert outside_the_vocabulary("if (threadIdx.x == 0) __syncthreads();") == ["threadIdx", "__sync"]
    assert outside_the_vocabulary("kernel<<<1, 32>>>(x);  // asm") == ["<<<"]
    assert outside_the_vocabulary("shared.atomic_max(0, peak);") == []
