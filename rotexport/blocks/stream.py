"""What passes between blocks for every calibration window, in a mapped file: no matter how many windows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rotexport.errors import OutputError

BATCH_TOKENS = 2048  # evaluated at a time


class Stream:
    """Activations [windows, tokens, width] at one point of the residual stream, as float32 in `path`.

    Raises:
        OutputError: the disk has no room for them.

    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self.path = path
        if not path.exists():
            _reserve(path, math.prod(shape) * np.dtype(np.float32).itemsize)
        self._values = np.memmap(path, np.float32, "r+", shape=tuple(shape))
        self._batch = max(1, BATCH_TOKENS // shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Windows, tokens, width."""
        return tuple(self._values.shape)

    def batches(self) -> list[slice]:
        """Return the windows that are evaluated together."""
        return [slice(start, start + self._batch) for start in range(0, len(self._values), self._batch)]

    def __getitem__(self, windows: slice) -> Tensor:
        return torch.from_numpy(np.array(self._values[windows]))

    def __setitem__(self, windows: slice, values: Tensor) -> None:
        self._values[windows] = values.detach().numpy()

    def __iter__(self) -> Iterator[Tensor]:
        return (self[windows] for windows in self.batches())

    def flush(self) -> None:
        """Write everything to the disk."""
        self._values.flush()

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """Create a file of `size` bytes that are there: a hole written to on a full disk ends the process."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(
            f"no room for {size:,} bytes of calibration activations in '{path.parent}': {error.strerror}; "
            "free some, look at fewer calibration_windows, or name a folder elsewhere with --resume"
        ) from error
