"""Builds with learned weights: what runs in ONNX Runtime is what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from rotexport.blocks.split import split_blocks
from rotexport.build import BuildOptions, build
from rotexport.errors import RecipeError
from rotexport.learning import network as module
from rotexport.learning.distill import Teacher
from rotexport.recipe import from_mapping
from rotexport.runtime.model import OnnxModel

TOKENS = np.random.default_rng(0).integers(3, 90, (1, 20))
LEARNED = {
    "dtype": "fp32",
    "rotations": {"r1": "random-hadamard", "r4": "hadamard"},
    "weights": {"format": "int4", "group": 16, "method": "gptq"},
    "calibration_windows": 4,
    "distill": {"steps": 12, "weight_rate": 0.03},
}


def test_a_build_runs_the_weights_that_were_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {}

    def keep(network, students, folder, losses):
        edits = [student.edits for student in students]
        teacher = Teacher(split_blocks(network.graph), [s.block for s in students], context_of(network))
        with torch.no_grad():
            trained["logits"] = teacher.logits(TOKENS, edits)[0].numpy()
        return export(network, students, folder, losses)

    def context_of(network):
        return split_blocks(network.graph).context(TOKENS.shape[1])

    export = module._export
    monkeypatch.setattr(module, "_export", keep)
    report = build(tiny_model("llama"), tmp_path / "out", from_mapping(LEARNED), BuildOptions(validate=False))
    logits = OnnxModel(tmp_path / "out" / "model.onnx").run(TOKENS)["logits"][0]
    # Float32 sums in another order.
    np.testing.assert_allclose(logits, trained["logits"], atol=1e-5 * np.abs(logits).max())
    assert any("distilled for 12 steps" in note for note in report.notes)


def test_static_activations_are_refused_before_the_model_is_read(tmp_path: Path) -> None:
    recipe = from_mapping({**LEARNED, "activations": {"format": "int8", "mode": "static"}})
    with pytest.raises(RecipeError, match="dynamic activations only"):
        build(tiny_model("llama"), tmp_path / "out", recipe, BuildOptions(validate=False))


def test_the_report_shows_each_block_before_and_after_every_step(tmp_path: Path) -> None:
    recipe = from_mapping(
        {
            **LEARNED,
            "activations": {"format": "int4", "mode": "dynamic"},
            "clip_search": {"candidates": 3, "windows": 1},
            "distill": {"steps": 2},
        }
    )
    report = build(tiny_model("llama", initializer_range=0.3), tmp_path / "out", recipe)
    steps = [step.step for step in report.steps]
    assert steps == ["as exported", "rotated", "clips", "weights chosen", "clips again", "distilled"]
    assert all(len(step.blocks) == 2 and all(error > 0 for error in step.blocks) for step in report.steps)
    errors = {step.step: sum(step.blocks) for step in report.steps}
    assert errors["weights chosen"] < errors["clips"]
    assert {choice.search for choice in report.clips} == {1, 2}
    assert all(choice.after <= choice.before for choice in report.clips)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Step by step</h2>" in page and "<h2>Clips</h2>" in page


def test_a_build_that_only_rounds_measures_no_steps(tmp_path: Path) -> None:
    report = build(tiny_model("llama"), tmp_path / "out", from_mapping({"dtype": "fp32"}))
    assert report.steps == () and report.clips == ()


def test_a_build_that_is_resumed_learns_nothing_twice(tmp_path: Path) -> None:
    recipe = from_mapping(
        {
            "dtype": "fp32",
            "rotations": {"r1": "learned"},
            "weights": {"format": "int4", "group": 16, "method": "gptq"},
            "activations": {"format": "int4", "mode": "dynamic"},
            "kv_cache": {"key": "int4", "value": "int4"},
            "calibration_windows": 2,
            "learn_rotations": {"steps": 4, "windows": 2},
            "learn_affine": {"steps": 2, "clip_rate": 0.05, "windows": 2},
            "clip_search": {"candidates": 3, "windows": 1},
            "distill": {"steps": 2},
        }
    )
    options, logits, kept = BuildOptions(validate=False, resume=tmp_path / "kept"), [], []
    for name in ("first", "second"):
        build(tiny_model("llama"), tmp_path / name, recipe, options)
        logits.append(OnnxModel(tmp_path / name / "model.onnx").run(TOKENS)["logits"])
        results = [*(tmp_path / "kept").rglob("*.pt"), *(tmp_path / "kept").glob("block-*.npz")]
        kept.append({path: path.stat().st_mtime_ns for path in results})
    assert {path.parent.name for path in kept[0]} == {"rotations", "transforms", "kept"}
    assert kept[0] == kept[1]
    np.testing.assert_array_equal(*logits)
