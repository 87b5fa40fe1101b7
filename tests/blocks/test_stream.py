"""Streams between blocks: what is written is read again, and a full disk is an error, not the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rotexport.blocks.stream import Stream
from rotexport.errors import OutputError


def test_what_was_written_is_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    values = torch.arange(3 * 1024 * 4.0).reshape(3, 1024, 4)
    stream = Stream(tmp_path / "a.stream", values.shape)
    for windows in stream.batches():
        stream[windows] = values[windows]
    stream.flush()
    torch.testing.assert_close(torch.cat(list(Stream(tmp_path / "a.stream", values.shape))), values)


def test_a_disk_without_room_is_an_error_before_anything_is_computed(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # a limit on the size of files stands in for a full disk
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OutputError, match="no room for 131,072 bytes of calibration activations in '"):
            Stream(tmp_path / "a.stream", (2, 64, 256))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
