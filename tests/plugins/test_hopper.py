"""Kernels of instructions that only newer GPUs have: no machine here runs their code, but what it is made of can be read."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import resources

PLUGINS = Path(__file__).parents[2] / "plugins"
CUTLASS = PLUGINS / "build" / "cutlass"
HOPPER = ("-gencode", "arch=compute_90a,code=sm_90a")


def disassembler() -> str | None:
    """Return nvdisasm, of the CUDA toolkit or of PyPI's nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    wheels = [path for folder in folders or () for path in Path(folder).glob("*/bin/nvdisasm")]
    return shutil.which("nvdisasm") or next((str(path) for path in wheels), None)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("element", ["Half", "BFloat16"])
def test_prefill_multiplies_by_warpgroups_from_copied_tiles(tmp_path: Path, element: str, size: int) -> None:
    """Nothing spills, products wait for nothing but what the source says, registers change hands, and all of it shows
    in the machine code."""
    cubin = tmp_path / "prefill.cubin"
    command = [
        *("nvcc", "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", f"-I{PLUGINS}", "-Xptxas=-v"),
        *(f"-DROTEXPORT_ELEMENT=device::{element}", f"-DROTEXPORT_SIZE={size}", *HOPPER, "-cubin"),
        *(str(PLUGINS / "kernels" / "attention_warpgroup.cu"), "-o", str(cubin)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = resources.parse(done.stderr)
    assert resources.complaints([record], done.stderr) == []
    assert record["registers"] == 168  # 384 threads share 64 K
    if (nvdisasm := disassembler()) is None:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    kind = "" if element == "Half" else ".BF16"
    keys = re.findall(rf"HGMMA\.64x128x16\.F32{kind} R\d+, gdesc\[UR\d+\], ", text)
    values = re.findall(rf"HGMMA\.64x{size}x16\.F32{kind} R\d+, R\d+, gdesc\[UR\d+\]\.tnspB, ", text)
    assert len(keys) == 2 * size // 16  # of the first tile, and in the loop
    assert len(values) == 2 * 128 // 16
    copies = re.findall(r"UTMALDG\.3D ", text)
    assert len(copies) % (size // 64) == 0 and copies
    assert not re.findall(r"\b(?:HMMA|LDL|STL)\b", text)
    assert {"USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"} <= set(re.findall(r"USETMAXREG\.\w+", text))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("element", ["Half", "BFloat16"])
def test_halves_are_made_of_fp8_by_an_instruction(tmp_path: Path, element: str) -> None:
    """Decoding converts two bytes at a time; for bfloat16, which has no such instruction, bits are moved."""
    cubin = tmp_path / "decode.cubin"
    command = [
        *("nvcc", "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", f"-I{PLUGINS}", *HOPPER),
        *(f"-DROTEXPORT_ELEMENT=device::{element}", "-DROTEXPORT_FORMAT=kFp8", "-cubin"),
        *(str(PLUGINS / "kernels" / "attention_decode.cu"), "-o", str(cubin)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    if (nvdisasm := disassembler()) is None:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    assert bool(re.findall(r"F2FP\.F16\.E4M3\.UNPACK_B ", text)) == (element == "Half")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.skipif(not CUTLASS.is_dir(), reason="python plugins/tools/fetch_cutlass_headers.py was not run")
def test_it_multiplies_8_bit_integers_by_warpgroups(tmp_path: Path) -> None:
    ptx = tmp_path / "product.ptx"
    command = [
        *("nvcc", "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", f"-I{PLUGINS}", "-isystem"),
        *(str(CUTLASS), "-DROTEXPORT_ELEMENT=cutlass::half_t", "-DROTEXPORT_ENDS=true"),
        *("-gencode", "arch=compute_90a,code=compute_90a", "-ptx"),
        *(str(PLUGINS / "kernels" / "quantized_linear_hopper.cu"), "-o", str(ptx)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    text = ptx.read_text()
    assert "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8" in text
    assert "mma.sync.aligned" not in text
