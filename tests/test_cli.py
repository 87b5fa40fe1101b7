"""The command line: what it prints, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import tiny_model

from rotexport.cli import main
from rotexport.recipe import load_recipe, preset_names


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("builds") / "out"
    assert main(["build", str(model), "-o", str(out), "--recipe", "quarot-w8a8", "-q"]) == 0
    return out


def error(capsys, *arguments: str) -> str:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    (line,) = [line for line in lines if line.startswith("rotexport: error:")]
    assert lines[-1] == line
    return line


def test_the_module_is_the_command_and_starts_without_pytorch() -> None:
    script = "import sys, rotexport.__main__"
    done = subprocess.run(
        [sys.executable, "-m", "rotexport", "recipes"], capture_output=True, text=True, check=True
    )
    assert all(name in done.stdout for name in preset_names())
    check = f"import sys; from rotexport.cli import main; main(['recipes']); assert 'transformers' not in sys.modules # {script}"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_a_recipe_is_printed_as_yaml_that_reads_back(capsys, tmp_path: Path) -> None:
    assert main(["recipes", "quarot-w4a4kv4"]) == 0
    (tmp_path / "copy.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "copy.yaml")) == load_recipe("quarot-w4a4kv4")


def test_doctor_names_every_target(capsys) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(f"target {name}" in out for name in ("onnx", "tensorrt-rtx", "tensorrt"))


def test_settings_change_the_recipe(model: Path, tmp_path: Path, capsys) -> None:
    settings = ["--set", "rotations.r4.block=4", "--set", "weights.format=int4", "--set", "weights.group=16"]
    assert (
        main(
            [
                "build",
                str(model),
                "-o",
                str(tmp_path / "out"),
                "--recipe",
                "quarot-w8a8",
                "--dtype",
                "fp32",
                "-q",
                *settings,
            ]
        )
        == 0
    )
    recipe = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert (recipe.dtype, recipe.weights.format, recipe.weights.group, recipe.rotations.r4.block) == (
        "fp32",
        "int4",
        16,
        4,
    )
    assert "perplexity" in capsys.readouterr().out


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(model: Path, tmp_path: Path, capsys) -> None:
    assert (
        main(["build", str(model), "-o", str(tmp_path / "out"), "--recipe", "quarot-w4a8", "--dry-run", "-q"])
        == 0
    )
    out = capsys.readouterr().out
    assert "2 x down     weights int4, groups of 32; activations int8 dynamic, groups of 64" in out
    assert "1 x head     weights none; activations none" in out
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_gets_one_line_per_stage(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rotexport", "build", str(model), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stages = [line.partition(":")[0] for line in done.stderr.splitlines()]
    assert stages == ["open", "export", "reference", "rotate", "quantize", "write", "validate"]


def test_inspect_prints_components_transforms_and_outliers(model: Path, capsys) -> None:
    assert main(["inspect", str(model), "-q"]) == 0
    out = capsys.readouterr().out
    assert "residual stream" in out
    assert "RMSNormalization" in out
    assert "r4" in out
    assert "0.down" in out


@pytest.mark.parametrize("what", ["build", "model.onnx"])
def test_inspect_reads_builds_and_graphs(built: Path, what: str, capsys) -> None:
    path = built if what == "build" else built / "model.onnx"
    assert main(["inspect", str(path), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["components"]


def test_validate_repeats_the_proof(built: Path, capsys) -> None:
    assert main(["validate", str(built), "-q"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["cosine"] > 0.95
    assert (
        json.loads((built / "validation.json").read_text())["proof"]["comparison"]["cosine"]
        == figures["cosine"]
    )


def test_validate_fails_past_a_threshold(model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["build", str(model), "-o", str(out), "--recipe", "w8a8", "-q"]) == 0
    manifest = json.loads((out / "rotexport.json").read_text())
    manifest["recipe"] = manifest["recipe"].replace("kl: null", "kl: 1.0e-12")
    (out / "rotexport.json").write_text(json.dumps(manifest))
    assert "kl" in error(capsys, "validate", str(out), "-q")


def test_mistakes_are_one_clear_line(model: Path, built: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "out")
    assert "does not exist" in error(capsys, "build", str(tmp_path / "missing"), "-o", out)
    assert "did you mean 'quarot-w8a8'?" in error(
        capsys, "build", str(model), "-o", out, "--recipe", "quarot-w8a9"
    )
    assert "unknown key 'weights.fromat'; did you mean 'format'?" in error(
        capsys, "build", str(model), "-o", out, "--set", "weights.fromat=int8"
    )
    assert "is not one of" in error(capsys, "build", str(model), "-o", out, "--set", "weights.format=int3")
    assert "sm90" in error(
        capsys, "build", str(model), "-o", out, "--target", "tensorrt-rtx", "--gpu", "sm90"
    )
    assert "w8a8" in error(
        capsys, "build", str(model), "-o", out, "--target", "tensorrt-rtx", "--gpu", "sm86", "--recipe", "fp8"
    )
    assert "--force" in error(capsys, "build", str(model), "-o", str(built))
    assert "is not a build" in error(capsys, "validate", str(tmp_path))
    assert "cannot be read" in error(capsys, "inspect", str(tmp_path / "missing.onnx"))
    assert not Path(out).exists()


def test_a_truncated_checkpoint_is_named(model: Path, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in error(capsys, "build", str(broken), "-o", str(tmp_path / "out"))


@pytest.mark.parametrize("signals", [1, 3])
def test_a_terminated_build_leaves_nothing(model: Path, tmp_path: Path, signals: int) -> None:
    command = [sys.executable, "-m", "rotexport", "build", str(model), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("export:"):
            for _ in range(signals):
                process.terminate()
            break
    assert "interrupted" in process.stderr.read()
    assert process.wait() == 130
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_is_refused(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in error(capsys, "build", str(model), "-o", str(tmp_path / "file" / "out"))
