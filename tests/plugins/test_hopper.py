"""The product that CUTLASS compiles for Hopper: nothing here can run it, but what it is made of can be read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"
CUTLASS = PLUGINS / "build" / "cutlass"


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
