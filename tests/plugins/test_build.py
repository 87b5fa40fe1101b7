"""Building the plugin library, and listing what it registers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import resources
from fast_hadamard_cases import Case, model_of
from symbols import assert_loadable_without_tensorrt

from rotexport.errors import TargetError
from rotexport.plugins import build, build_library, list_creators
from rotexport.plugins import test_library as check_library

ROOT = Path(__file__).parents[2]
HEADERS = Path(os.environ.get("TENSORRT_ROOT") or ROOT / "plugins" / "build" / "tensorrt")

PTXAS = """
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function '_Z3badv' for 'sm_90a'
ptxas info    : Function properties for _Z3badv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 128 registers, used 0 barriers
"""


@pytest.fixture
def library(emulated: Path) -> Path:
    found = next(emulated.glob("librotexport_plugins_trt*.so"), None)
    if found is None:
        pytest.skip("TensorRT's headers are missing: python plugins/tools/fetch_tensorrt_headers.py")
    return found


def test_reads_the_assemblers_report() -> None:
    good, bad = resources.parse(PTXAS)
    assert good == {
        **{"kernel": "_Z4goodv", "architecture": "sm_80", "registers": 40, "shared_bytes": 1024},
        **{"stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0},
    }
    assert (bad["architecture"], bad["registers"], bad["spill_store_bytes"]) == ("sm_90a", 128, 12)


def test_spills_and_ignored_instructions_fail_a_build() -> None:
    assert resources.complaints(resources.parse(PTXAS)[:1], "") == []
    spilled, ignored = resources.complaints(
        resources.parse(PTXAS), "ptxas warning : (C7508) setmaxnreg ignored"
    )
    assert "_Z3badv (sm_90a) keeps registers in memory: 12 bytes spilled" in spilled
    assert "C7508" in ignored


@pytest.mark.parametrize("name", ["sm_75", "sm_90b", "90a", "compute_1", ""])
def test_an_unknown_architecture_is_refused(name: str) -> None:
    with pytest.raises(TargetError, match=rf"architecture '{name}': the kernels build for sm_80"):
        build_library([name])


def test_no_architecture_is_refused() -> None:
    with pytest.raises(TargetError, match="name at least one"):
        build_library([])


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.Path, "is_file", lambda path: path.name == "CMakeLists.txt")
    with pytest.raises(TargetError, match="nvcc was not found: install the CUDA toolkit"):
        build_library(["sm_80"])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    with pytest.raises(TargetError, match="set TENSORRT_ROOT"):
        build_library(["sm_80"])
    with pytest.raises(TargetError, match=r"TENSORRT_ROOT is '.*', but neither it nor its include/ holds"):
        build_library(["sm_80"], tensorrt_root=tmp_path)


@pytest.mark.skipif(
    shutil.which("nvcc") is None or not HEADERS.is_dir(),
    reason="the library build needs nvcc and TensorRT's headers",
)
def test_one_architecture_builds_without_spills() -> None:
    """The build directory is kept, so only what changed is compiled again."""
    report = build_library(["sm_90a"], tensorrt_root=HEADERS)
    assert report.library.name.startswith("librotexport_plugins_trt")
    assert {record.architecture for record in report.resources} == {"sm_90a"}
    transforms = [record for record in report.resources if "fast_hadamard" in record.kernel]
    assert len(transforms) == 91  # 3 types x 3 outputs x 10 variants, and the packing of matrices
    assert all(record.registers <= 168 for record in transforms)
    attention = [r for r in report.resources if r.kernel.startswith("_ZN21sink_window_attention")]
    # 2 types x (5 sizes, and 2 on warpgroups; 5 formats x 3 sizes; 9 that move the cache, 2 for rows before that)
    assert len(attention) == 66
    evictions = [r for r in report.resources if r.kernel.startswith("_ZN8eviction")]
    assert len(evictions) == 28  # 2 types x (5 sizes x 2, and 4 that combine, recall, choose and store)
    own = [
        record for record in report.resources if "cutlass" not in record.kernel
    ]  # of headers that may be there
    linears = [record for record in own if "quantized_linear" in record.kernel]
    # 4-bit weights have 4 kinds of scales, 8-bit ones 3, for few and for many rows; and the sums of splits.
    assert len(linears) == 2 * (4 + 4 + 3) + 2
    assert not any(record.stack_bytes or record.spill_store_bytes for record in report.resources)
    assert_loadable_without_tensorrt(report.library)
    if importlib.util.find_spec("tensorrt_rtx"):
        assert len(check_library(report.library)) >= 3 + 18 + 26 + 2


def test_tensorrts_registry_lists_the_creators(library: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    listed = list_creators(library)
    hadamards = [one for one in listed if one.name.startswith("FastHadamard")]
    assert [(one.name, one.version, one.namespace, one.fields) for one in hadamards] == [
        ("FastHadamard", "1", "rotexport", ()),
        ("FastHadamardInt4", "1", "rotexport", ("clip",)),
        ("FastHadamardInt8", "1", "rotexport", ("clip",)),
    ]
    linears = [one for one in listed if one.name.startswith("QuantizedLinear")]
    assert len(linears) == 18
    assert all(set(one.fields) == {"group", "out_type"} for one in linears)
    attentions = [one for one in listed if one.name.startswith("SinkWindowAttention")]
    assert len(attentions) == 26
    assert all({"window", "scale", "softcap"} < set(one.fields) for one in attentions)
    evictions = [one for one in listed if one.name in {"HeavyHitterAttention", "SnapAttention"}]
    assert len(evictions) == 2
    assert all({"window", "recent", "context"} < set(one.fields) for one in evictions)
    assert check_library(library) == listed


PARSE = """
import sys
import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.ERROR)
if len(sys.argv) > 2:
    trt.get_plugin_registry().load_library(sys.argv[2])
network = trt.Builder(logger).create_network(0)
parser = trt.OnnxParser(network, logger)
parsed = parser.parse_from_file(sys.argv[1])
print("parsed" if parsed else "refused", network.num_layers, flush=True)
"""


def parse_in_tensorrt(*arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PARSE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_node_selects_its_body_or_its_plugin(library: Path, tmp_path: Path) -> None:
    """Without the library TensorRT-RTX inlines the body. With it the plugin is chosen, which it cannot hold: it ends
    the process."""
    pytest.importorskip("tensorrt_rtx")
    case = Case(12, 8, rows=4)
    model = tmp_path / "one.onnx"
    onnx.save(model_of("FastHadamardInt8", case, *case.inputs(np.dtype(np.float16)), clip=0.9), model)
    body = parse_in_tensorrt(model)
    assert body.stdout.startswith("parsed"), body.stderr
    assert int(body.stdout.split()[1]) > 10
    plugin = parse_in_tensorrt(model, library)
    assert plugin.returncode != 0 and "parsed" not in plugin.stdout


def test_what_is_no_plugin_library_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(TargetError, match="no plugin library at"):
        list_creators(tmp_path / "missing.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(TargetError, match="does not load as a plugin library"):
        list_creators(broken)
