"""What every GPU script does around its own checks, with kernels, a GPU and results made up."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import measuring
import pytest
import torch
from measuring import SLOW, WRONG, Benchmark


@dataclass(frozen=True)
class Result:
    """A made-up time."""

    name: str
    seconds: float


def benchmark(wrong: list[str], seconds: float) -> Benchmark[Result]:
    def shortfalls(results: list[Result]) -> Iterable[str]:
        return (f"{result.name} is slow" for result in results if result.seconds > 1)

    return Benchmark(
        script="script.py",
        name="product",
        check=lambda library: [f"{library}: {line}" for line in wrong],
        measure=lambda library: [Result("64 rows", seconds)],
        table=lambda results: " | ".join(result.name for result in results),
        shortfalls=shortfalls,
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pretend that there is a GPU; return where results go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measuring, "machine", lambda: {"gpu": "A GPU", "date": "2026-01-02"})
    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_results_and_what_they_were_measured_on_are_kept(
    gpu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark([], 0.5).main("Measures.", ["--library", "built.so"]) == 0
    (path,) = gpu.iterdir()
    assert path.name == "a-gpu-2026-01-02-product.json"
    assert json.loads(path.read_text()) == {
        "machine": {"gpu": "A GPU", "date": "2026-01-02"},
        "results": [{"name": "64 rows", "seconds": 0.5}],
    }
    assert "everything reaches what it must" in capsys.readouterr().out


def test_what_is_slow_is_kept_and_fails(gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark([], 2.0).main("Measures.", ["--library", "built.so"]) == SLOW
    assert len(list(gpu.iterdir())) == 1
    assert "64 rows is slow" in capsys.readouterr().out


def test_what_is_wrong_is_not_measured(gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["a NaN"], 0.5).main("Measures.", ["--library", "built.so"]) == WRONG
    assert not gpu.exists()
    assert "built.so: a NaN" in capsys.readouterr().err


def test_checks_alone_write_nothing(gpu: Path) -> None:
    assert benchmark([], 2.0).main("Measures.", ["--library", "built.so", "--check-only"]) == 0
    assert not gpu.exists()


def test_without_a_gpu_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        benchmark(["wrong"], 2.0).main("Measures.", [])
