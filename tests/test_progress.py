"""Stages: what is printed where, what is recorded, and what an error says."""

import io
import multiprocessing
import threading
import time

import numpy as np
import pytest
from rich.console import Console

from rotexport.errors import TransformError
from rotexport.progress import PeakMemory, Stages, Verbosity, anonymous_bytes

MEGABYTE = 1 << 20


def printed_by(body, verbosity=Verbosity.NORMAL, terminal=False):
    """Run `body(stages)`; return its stages and what they printed."""
    stream = io.StringIO()
    stages = Stages(verbosity, Console(file=stream, force_terminal=terminal, width=120, color_system=None))
    body(stages)
    return stages, stream.getvalue()


def two_stages(stages):
    with stages("export") as stage:
        stage.detail("tracing [block] 0")
        stage.advance(1, 2)
    with stages("rotate"):
        pass


def test_a_pipe_gets_one_line_per_stage():
    _, text = printed_by(two_stages)
    lines = text.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("export: 0.0 s")
    assert lines[1].startswith("rotate: 0.0 s")


def test_verbose_adds_the_details_as_they_are_written():
    _, text = printed_by(two_stages, Verbosity.VERBOSE)
    assert text.splitlines()[0] == "export: tracing [block] 0"


def test_quiet_prints_nothing_and_still_records():
    stages, text = printed_by(two_stages, Verbosity.QUIET)
    assert text == ""
    assert [record.name for record in stages.records] == ["export", "rotate"]


def test_a_terminal_shows_the_running_stage_and_keeps_its_result():
    def body(stages):
        with stages("export") as stage:
            stage.detail("tracing block 0")
            time.sleep(0.3)  # the live line is redrawn ten times a second

    _, text = printed_by(body, terminal=True)
    assert "tracing block 0" in text
    assert "✓ export: 0.3 s" in text


def test_seconds_are_recorded():
    def body(stages):
        with stages("sleep"):
            time.sleep(0.05)

    stages, _ = printed_by(body)
    assert 0.05 <= stages.records[0].seconds < 1.0


def test_an_error_names_the_stage_and_keeps_its_type():
    def body(stages):
        with pytest.raises(TransformError, match=r"^rotate: no Hadamard of order 9$"), stages("rotate"):
            raise TransformError("no Hadamard of order 9")

    stages, text = printed_by(body)
    assert text.startswith("rotate: failed after")
    assert stages.records == []


@pytest.mark.parametrize(
    ("error", "word"), [(ZeroDivisionError("x"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_other_errors_pass_unchanged_but_the_stage_is_named(error, word):
    def body(stages):
        with pytest.raises(type(error)) as caught, stages("rotate"):
            raise error
        assert caught.value is error

    _, text = printed_by(body)
    assert text.startswith(f"rotate: {word} after")


def test_no_thread_outlives_its_stage():
    printed_by(two_stages)
    assert "memory-sampler" not in {thread.name for thread in threading.enumerate()}


needs_proc = pytest.mark.skipif(anonymous_bytes() is None, reason="this system has no /proc/self/status")


@needs_proc
def test_the_peak_is_seen_after_the_memory_is_gone():
    before = anonymous_bytes()
    with PeakMemory() as memory:
        array = np.ones(64 * MEGABYTE, np.uint8)
        time.sleep(0.2)
        del array
    assert 60 * MEGABYTE < memory.peak - before < 90 * MEGABYTE
    assert anonymous_bytes() - before < 20 * MEGABYTE


@needs_proc
def test_mapped_files_do_not_count(tmp_path):
    np.ones(64 * MEGABYTE, np.uint8).tofile(tmp_path / "weights")
    before = anonymous_bytes()
    with PeakMemory() as memory:
        mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
        assert int(mapped[::4096].sum()) == 64 * 256
    assert memory.peak - before < 20 * MEGABYTE


@needs_proc
def test_child_processes_count_without_what_they_share():
    shared = np.ones(64 * MEGABYTE, np.uint8)
    before = anonymous_bytes()
    child = multiprocessing.get_context("fork").Process(target=_allocate_and_wait)
    with PeakMemory() as memory:
        child.start()
        child.join()
    assert 60 * MEGABYTE < memory.peak - before < 110 * MEGABYTE
    assert shared[0] == 1


def _allocate_and_wait():
    array = np.ones(64 * MEGABYTE, np.uint8)
    time.sleep(0.4)
    assert array[-1] == 1


def test_without_proc_there_is_no_figure(tmp_path):
    assert anonymous_bytes(tmp_path) is None
