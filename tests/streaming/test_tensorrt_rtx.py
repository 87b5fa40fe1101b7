"""Streaming graphs become TensorRT-RTX plans, without a GPU, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.streams import Shape, operator_graph
from support.tiny import tiny_model

from rotexport.checkpoint import open_checkpoint
from rotexport.export import export
from rotexport.graph.io import WeightFile, save_model, to_proto
from rotexport.passes.lasting_positions import LastingPositions
from rotexport.passes.precision import SetPrecision
from rotexport.passes.stream_attention import StreamAttention
from rotexport.streaming.cache import CacheFormat
from rotexport.streaming.eviction import Eviction
from rotexport.streaming.oracle import Definition
from rotexport.streaming.scheme import AttentionScheme
from rotexport.targets import builder_process
from rotexport.targets.inlining import inline
from rotexport.targets.lowering import lower

pytest.importorskip("tensorrt_rtx")

RANGES = {"batch": (1, 1, 2), "sequence": (1, 1, 32), "logit_count": (1, 1, 2)}


def build(model: onnx.ModelProto, folder: Path, gpu: str = "sm89") -> str:
    """Build a plan; return the builder's layer list."""
    path = folder / "engine.onnx"
    onnx.save(model, path)
    request = {
        "module": "tensorrt_rtx",
        "model": str(path),
        "plan": str(folder / "plan"),
        "layers": str(folder / "layers"),
        "compute_capability": gpu.upper(),
        "plugins": None,
        "profiles": [shapes(model)],
    }
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(builder_process.__file__), str(folder / "request.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return (folder / "layers").read_text()


def tiny_stream(rewrite: StreamAttention, folder: Path) -> onnx.ModelProto:
    """Return a tiny model in half precision with its attention swapped, expanded for the builder."""
    graph = export(open_checkpoint(tiny_model("llama")))
    SetPrecision(np.dtype(np.float16)).run(graph)
    rewrite.run(graph)
    LastingPositions().run(graph)
    path = folder / "model.onnx"
    save_model(graph, path, WeightFile(folder / "model.data"))
    return inline(onnx.load(path, load_external_data=False), folder)


def shapes(model: onnx.ModelProto) -> dict[str, list[list[int]]]:
    found = {}
    for value in model.graph.input:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if any(isinstance(dim, str) for dim in dims):
            found[value.name] = [[RANGES[d][i] if isinstance(d, str) else d for d in dims] for i in range(3)]
    return found


@pytest.mark.parametrize(("bits", "recent"), [(None, 0), (2, 8)])
def test_operators_build_as_they_are(bits: int | None, recent: int, tmp_path: Path) -> None:
    """Bodies inlined by the parser; attributes must not reach nested functions by reference (it reads 0)."""
    shape = Shape(
        Definition(4, 64, 0.125, bits=bits, group=16 if bits else None, recent=recent), 2, 3, 64, 64
    )
    layers = build(to_proto(operator_graph(shape, np.float16)), tmp_path)
    assert "gemm" in layers


@pytest.mark.parametrize(
    "stored",
    [CacheFormat(), CacheFormat(8), CacheFormat(4), CacheFormat(2, 4, 4, True), CacheFormat(8, fp8=True)],
    ids=str,
)
def test_models_build_with_shared_expressions(stored: CacheFormat, tmp_path: Path) -> None:
    means = {layer: np.ones((2, 8)) for layer in range(2)}
    model = tiny_stream(StreamAttention(AttentionScheme("streaming", 2, 16), stored, means), tmp_path)
    masks = [node for node in model.graph.node if node.op_type == "Mod"]
    rings = 1 + stored.recent // 4 + 2 * stored.center  # slots written, recent slots, angles of slots held
    assert len(masks) <= 2 * rings + 2, "ring arithmetic and positions are computed once, not per layer"
    assert "gemm" in build(model, tmp_path)


@pytest.mark.parametrize(
    ("policy", "window", "gpu"),
    [
        ("heavy-hitter", 16, "sm89"),
        ("snapkv", 5000, "sm89"),
        *(
            pytest.param(policy, window, gpu, marks=pytest.mark.slow)
            for policy in ("heavy-hitter", "snapkv")
            for window in (16, 5000)
            for gpu in ("sm80", "sm120")
        ),
    ],
)
def test_caches_that_evict_build_however_many_slots_they_have(
    policy: str, window: int, gpu: str, tmp_path: Path
) -> None:
    """A TopK of the builder gives 3,840 at most; the test of it alone is that of the lowering."""
    eviction = Eviction(policy, recent=4, context=8192)
    scheme = AttentionScheme("streaming", 2, window, eviction=eviction)
    model = lower(tiny_stream(StreamAttention(scheme), tmp_path))
    choices = [node for node in model.graph.node if node.op_type == "TopK"]
    assert len(choices) == 2 * 2 * (1 if window == 16 else 2), "two layers choose, then sort, in steps"
    assert "gemm" in build(model, tmp_path, gpu)


def test_half_precision_streams_stay_near_single(tmp_path: Path) -> None:
    """What is built is what ONNX Runtime runs: fp16 against fp32, float cache."""
    from rotexport.runtime.session import Session

    tokens = np.random.default_rng(0).integers(0, 96, 40)
    results = []
    for dtype in (np.float32, np.float16):
        graph = export(open_checkpoint(tiny_model("llama")))
        SetPrecision(np.dtype(dtype)).run(graph)
        StreamAttention(AttentionScheme("streaming", 2, 16)).run(graph)
        folder = tmp_path / np.dtype(dtype).name
        folder.mkdir()
        save_model(graph, folder / "model.onnx", WeightFile(folder / "model.data"))
        results.append(Session(folder, threads=1).prefill(tokens))
    assert results[1].dtype == np.float32
    np.testing.assert_allclose(results[1], results[0], atol=0.02 * np.abs(results[0]).max())
