"""What a build is doing, for a person at a terminal, for a log, and for the manifest.

Each stage is shown while it runs, timed, and its peak anonymous memory sampled (`RssAnon`: memory-mapped
weight files do not count). An error that leaves a stage says which stage that was.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from rotexport.errors import RotexportError

SAMPLE_SECONDS = 0.05


class Verbosity(IntEnum):
    """How much is printed: nothing, one line per stage, or every detail."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


@dataclass(frozen=True)
class StageRecord:
    """A finished stage; `peak_anonymous_bytes` is None where the system does not tell."""

    name: str
    seconds: float
    peak_anonymous_bytes: int | None


class Stage:
    """The running stage: say what it does, and how far it is."""

    def __init__(self, name: str, display: _Display) -> None:
        self.name = name
        self._display = display

    def detail(self, text: str) -> None:
        """Say what is being done now."""
        self._display.detail(text)

    def advance(self, done: int, of: int) -> None:
        """Say that `done` of `of` steps are finished."""
        self._display.advance(done, of)


class Stages:
    """Makes stages, one after the other, and keeps their records.

    On a terminal the running stage has a spinner; elsewhere each prints one line when it ends. `VERBOSE`
    adds the details as lines of their own.
    """

    def __init__(self, verbosity: Verbosity = Verbosity.NORMAL, console: Console | None = None) -> None:
        self.records: list[StageRecord] = []
        self._verbosity = verbosity
        self._console = console or Console(stderr=True, highlight=False)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Stage]:
        """Run the body as the stage `name`."""
        display = self._display(name)
        start = time.perf_counter()
        with PeakMemory() as memory:
            try:
                with display:
                    yield Stage(name, display)
            except BaseException as error:
                display.conclude(
                    f"{name}: {_how_it_ended(error)} after {_seconds(time.perf_counter() - start)}", "✗"
                )
                if isinstance(error, RotexportError):
                    error.args = (f"{name}: {error}",)
                raise
        record = StageRecord(name, time.perf_counter() - start, memory.peak)
        self.records.append(record)
        display.conclude(f"{name}: {_summary(record)}", "✓")

    def _display(self, name: str) -> _Display:
        if self._verbosity is Verbosity.QUIET:
            return _Display()
        if self._console.is_terminal:
            return _Spinner(name, self._console, self._verbosity)
        return _Lines(name, self._console, self._verbosity)


class _Display(contextlib.AbstractContextManager["_Display"]):
    """Shows nothing; the base of those that do."""

    def detail(self, text: str) -> None: ...

    def advance(self, done: int, of: int) -> None: ...

    def conclude(self, line: str, mark: str) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


class _Lines(_Display):
    """For logs: one line per stage, details above it when asked for."""

    def __init__(self, name: str, console: Console, verbosity: Verbosity) -> None:
        self._name = name
        self._console = console
        self._verbosity = verbosity

    def detail(self, text: str) -> None:
        if self._verbosity is Verbosity.VERBOSE:
            self._print(f"{self._name}: {text}")

    def conclude(self, line: str, mark: str) -> None:
        self._print(line)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


class _Spinner(_Lines):
    """For terminals: a live line with the latest detail, a bar when the number of steps is known."""

    def __init__(self, name: str, console: Console, verbosity: Verbosity) -> None:
        super().__init__(name, console, verbosity)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._task: TaskID = self._progress.add_task(name, total=None, detail="")

    def __enter__(self) -> _Spinner:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def detail(self, text: str) -> None:
        super().detail(text)
        self._progress.update(self._task, detail=text)

    def advance(self, done: int, of: int) -> None:
        self._progress.update(self._task, completed=done, total=of)

    def conclude(self, line: str, mark: str) -> None:
        self._print(f"{mark} {line}")


class PeakMemory:
    """Samples the anonymous memory of this process, and of the processes it started, while it is open."""

    def __init__(self) -> None:
        self.peak = anonymous_bytes()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-sampler", daemon=True)

    def __enter__(self) -> PeakMemory:
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._closing.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        now = anonymous_bytes()
        if now is not None and self.peak is not None:
            self.peak = max(self.peak, now)


def anonymous_bytes(proc: Path = Path("/proc")) -> int | None:
    """Return the anonymous memory of this process and its descendants; None where /proc does not exist.

    Pages that a forked child shares with its parent are counted once.
    """
    own = _field(proc / "self/status", "RssAnon")
    if own is None:
        return None
    family = _descendants(proc, "self")
    if not family:
        return own
    shares = [_field(proc / pid / "smaps_rollup", "Pss_Anon") for pid in ("self", *family)]
    return max(own, sum(share or 0 for share in shares))


def _descendants(proc: Path, pid: str) -> list[str]:
    found: list[str] = []
    for listing in (proc / pid / "task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread or the process is gone
            for child in listing.read_text().split():
                found += [child, *_descendants(proc, child)]
    return found


def _field(file: Path, name: str) -> int | None:
    """Return a `name: value kB` line of a /proc file, in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _how_it_ended(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _summary(record: StageRecord) -> str:
    if record.peak_anonymous_bytes is None:
        return _seconds(record.seconds)
    return f"{_seconds(record.seconds)}, peak memory {record.peak_anonymous_bytes / 1e6:,.0f} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
