"""Sessions on engines, with a stand-in for TensorRT that computes by ONNX Runtime: what is fed, kept, refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import engines
from support.builds import streaming_build
from transformers import PreTrainedModel

from rotexport.checkpoint import open_checkpoint
from rotexport.errors import TargetError, ValidationError
from rotexport.export import export
from rotexport.graph.io import WeightFile, save_model
from rotexport.runtime.engine import EngineGraph, Plan, load_library, open_engine
from rotexport.runtime.session import Session
from rotexport.streaming.eviction import Eviction
from rotexport.streaming.scheme import AttentionScheme

TOKENS = np.random.default_rng(0).integers(0, 96, 40)


def engine(model: Path, folder: Path) -> EngineGraph:
    folder.mkdir(exist_ok=True)
    plan = folder / "stand-in-sm00.plan"
    plan.write_text(str(model))
    return EngineGraph(Plan(plan, engines, torch.device("cpu")))


@pytest.fixture(scope="module")
def dense_model(tiny: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "model.onnx"
    save_model(export(open_checkpoint(tiny)), path, WeightFile(path.with_suffix(".data")))
    return path


def test_a_streaming_engine_is_fed_as_the_graph_is(streaming_model: Path, tmp_path: Path) -> None:
    graph = engine(streaming_model, tmp_path)
    assert graph.call_tokens == 12  # the window
    expected = Session(streaming_model, threads=1).graph.logits(TOKENS)
    np.testing.assert_allclose(graph.logits(TOKENS), expected, atol=1e-5 * np.abs(expected).max())
    assert graph.cache_bytes == Session(streaming_model, threads=1).cache_bytes


def test_a_dense_engine_grows_its_cache(dense_model: Path, tmp_path: Path) -> None:
    graph = engine(dense_model, tmp_path)
    assert (graph.call_tokens, graph.cache_bytes) == (16, 0)
    expected = Session(dense_model, threads=1).graph.logits(TOKENS[:20])
    np.testing.assert_allclose(graph.logits(TOKENS[:20]), expected, atol=1e-5 * np.abs(expected).max())
    assert graph.cache_bytes == 2 * 2 * 20 * 2 * 8 * 4


def test_a_prompt_longer_than_the_profile_is_refused(dense_model: Path, tmp_path: Path) -> None:
    graph = engine(dense_model, tmp_path)
    with pytest.raises(ValidationError, match=r"32 in 'attention_mask', which may be 1 to 24.*--max-length"):
        graph.logits(TOKENS)


def test_a_prompt_that_chooses_what_stays_is_never_split(tiny: PreTrainedModel, tmp_path: Path) -> None:
    eviction = Eviction("snapkv", recent=4, context=64, observe=4)
    scheme = AttentionScheme("streaming", 2, 12, eviction=eviction)
    model = streaming_build(tiny, tmp_path / "snap", scheme=scheme)
    session = Session.over(engine(model, tmp_path))
    expected = Session(model, threads=1).prefill(TOKENS[:16])
    np.testing.assert_allclose(session.prefill(TOKENS[:16]), expected, atol=1e-5 * np.abs(expected).max())
    session.reset()
    with pytest.raises(ValidationError, match="20 in 'input_ids', which may be 1 to 16"):
        session.prefill(TOKENS[:20])


def test_a_saved_cache_continues(streaming_model: Path, tmp_path: Path) -> None:
    session = Session.over(engine(streaming_model, tmp_path))
    session.prefill(TOKENS[:30])
    session.save(tmp_path / "stream.npz")
    expected = session.step(TOKENS[30])
    other = Session.over(engine(streaming_model, tmp_path))
    other.restore(tmp_path / "stream.npz")
    np.testing.assert_array_equal(other.step(TOKENS[30]), expected)


def test_a_plan_that_the_library_cannot_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"support\.engines 9\.9 cannot read .*stand-in-sm00\.plan"):
        engine(tmp_path / "gone.onnx", tmp_path)


def test_an_engine_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", engines)
    assert load_library("tensorrt", {"versions": {"tensorrt": "9.9"}}) is engines
    with pytest.raises(TargetError, match=r"built by tensorrt 9\.8, and 9\.9 is installed"):
        load_library("tensorrt", {"versions": {"tensorrt": "9.8"}})
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(TargetError, match=r"pip install 'tensorrt==9\.8'"):
        load_library("tensorrt", {"versions": {"tensorrt": "9.8"}})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_engines_or_gpu_onnx_runtime_is_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="has no engines"):
        open_engine(tmp_path)
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "tensorrt-rtx-sm89.plan").write_text("")
    with pytest.raises(TargetError, match="need a GPU"):
        open_engine(tmp_path)


def test_tensorrt_rtx_has_what_is_called() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    for stand_in in ("Runtime", "Engine", "Context"):
        real = {"Engine": "ICudaEngine", "Context": "IExecutionContext"}.get(stand_in, stand_in)
        called = [name for name in vars(getattr(engines, stand_in)) if not name.startswith("_")]
        missing = [name for name in called if not hasattr(getattr(library, real), name)]
        assert not missing
    assert {kind.name for kind in (library.DataType.HALF, library.DataType.BF16)} == {"HALF", "BF16"}
