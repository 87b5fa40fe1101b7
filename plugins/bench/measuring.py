"""What scripts share around checks and measurements: timing, compute-sanitizer, results, exit status."""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from gpu_kernels import PLUGINS, build

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REPEATS = 30
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
RESULTS = PLUGINS / "bench" / "results"
WRONG, SLOW = 1, 2  # exit statuses

R = TypeVar("R", bound="DataclassInstance")


@dataclass(frozen=True)
class Benchmark(Generic[R]):
    """What a script checks and measures, given the library of the built kernels.

    Args:
        script: its file.
        name: ends the name of the file with its results.
        check: returns in words what is wrong.
        measure: yields results, one by one.
        table: shows results as the Markdown table of plugins/README.md.
        shortfalls: yields in words what results miss; None where nothing is asked of them.

    """

    script: str
    name: str
    check: Callable[[Path], list[str]]
    measure: Callable[[Path], Iterable[R]]
    table: Callable[[list[R]], str]
    shortfalls: Callable[[list[R]], Iterable[str]] | None = None

    def main(self, description: str | None, arguments: Sequence[str] | None = None) -> int:
        """Build, check, measure, write; return the exit status."""
        options = _options(description, arguments)
        if not torch.cuda.is_available():
            raise SystemExit("PyTorch sees no GPU on this machine: run this where one is")
        library = options.library or build(PLUGINS / "build" / "bench")
        wrong = self.check(library)
        if wrong:
            print("\n".join(wrong), file=sys.stderr)
            return WRONG
        if options.sanitize:
            sanitize(self.script, library)
        if options.check_only:
            return 0
        results = []
        for result in self.measure(library):
            results.append(result)
            torch.cuda.empty_cache()
        print(self.table(results))
        missed = list(self.shortfalls(results)) if self.shortfalls else []
        if self.shortfalls:
            print("\n".join(missed) or "everything reaches what it must")
        print(f"written to {self._write(results)}")
        return SLOW if missed else 0

    def _write(self, results: list[R]) -> Path:
        about = machine()
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{about['gpu'].replace(' ', '-')}-{about['date']}-{self.name}.json".lower()
        record = {"machine": about, "results": [asdict(result) for result in results]}
        path.write_text(json.dumps(record, indent=1), "utf-8")
        return path


def median_seconds(actions: Sequence[Callable[[], object]]) -> float:
    """Return the median time of one action, the actions (one per buffer) taking turns."""
    for action in actions:
        action()
    times = []
    for repeat in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        actions[repeat % len(actions)]()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=PLUGINS
    )
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.split("\n")[0].strip(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def sanitize(script: str, library: Path) -> None:
    """Run a script's checks once more under compute-sanitizer where it is installed."""
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed: skipped")
        return
    command = [sys.executable, script, "--library", str(library), "--check-only"]
    for tool in ("memcheck", "racecheck"):
        done = subprocess.run(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command], check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"compute-sanitizer's {tool} found errors")


def _options(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--library", type=Path, help="a built librotexport_bench.so; default: build it")
    parser.add_argument("--check-only", action="store_true", help="check, but do not measure")
    parser.add_argument("--sanitize", action="store_true", help="check under compute-sanitizer too")
    return parser.parse_args(arguments)
