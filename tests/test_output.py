"""An output exists completely or not at all."""

from pathlib import Path

import pytest

from rotexport.errors import OutputError
from rotexport.output import OutputDirectory


def finish(path: Path, text: str = "{}", *, force: bool = False) -> None:
    with OutputDirectory(path, force=force) as work:
        (work / "rotexport.json").write_text(text)


def test_success_gives_the_directory_its_name(tmp_path: Path) -> None:
    finish(tmp_path / "deep" / "out")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "rotexport.json").read_text() == "{}"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_and_interruption_leave_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), OutputDirectory(tmp_path / "out") as work:
        (work / "model.onnx").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_the_directory_is_made_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    interrupt_after(monkeypatch, "mkdir")
    with pytest.raises(KeyboardInterrupt), OutputDirectory(tmp_path / "out"):
        pytest.fail("it was interrupted before")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_replacement_leaves_one_of_both_builds(tmp_path: Path, monkeypatch, call: int) -> None:
    finish(tmp_path / "out", "old")
    interrupt_after(monkeypatch, "rename", call)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "rotexport.json").read_text() == {1: "old", 2: "new"}[call]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, method: str, call: int = 1) -> None:
    """Have the `call`-th call of a method of Path be interrupted when it has done its work."""
    original, calls = getattr(Path, method), iter(range(1, 100))

    def interrupted(*arguments, **keywords):
        result = original(*arguments, **keywords)
        if next(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, method, interrupted)


def test_an_existing_output_is_refused_without_force_and_replaced_with_it(tmp_path: Path) -> None:
    finish(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="--force"):
        finish(tmp_path / "out", "new")
    finish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "rotexport.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_keeps_the_old_output(tmp_path: Path) -> None:
    finish(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), OutputDirectory(tmp_path / "out", force=True):
        raise RuntimeError
    assert (tmp_path / "out" / "rotexport.json").read_text() == "old"


def test_force_does_not_delete_what_is_not_a_build(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not a rotexport build"):
        finish(tmp_path / "home", force=True)


def test_a_build_that_missed_its_thresholds_is_kept_under_another_name(tmp_path: Path) -> None:
    output = OutputDirectory(tmp_path / "out")
    with pytest.raises(RuntimeError), output as work:
        (work / "report.html").write_text("why")
        output.keep_failed()
        raise RuntimeError
    assert (tmp_path / "out.failed" / "report.html").read_text() == "why"
    assert not (tmp_path / "out").exists()
