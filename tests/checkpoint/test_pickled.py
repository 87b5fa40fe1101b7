"""Pickled PyTorch files: located, never executed."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from rotexport.checkpoint.pickled import read_pickled
from rotexport.errors import CheckpointError


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def test_views_transposes_and_shared_storage_are_located(path):
    matrix = torch.arange(12.0).reshape(3, 4)
    halves = torch.arange(5).to(torch.bfloat16)
    torch.save({"matrix": matrix, "rows": matrix[1:], "turned": matrix.t(), "halves": halves}, path)
    tensors = read_pickled(path)
    np.testing.assert_array_equal(tensors["matrix"].read(), matrix)
    np.testing.assert_array_equal(tensors["rows"].read(), matrix[1:])
    np.testing.assert_array_equal(tensors["turned"].read(), matrix.t())
    assert tensors["halves"].dtype == np.dtype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensors["halves"].read().astype(np.float32), np.arange(5))


def test_parameters_count_as_tensors(path):
    torch.save(torch.nn.Linear(2, 2).state_dict(keep_vars=True), path)
    assert set(read_pickled(path)) == {"weight", "bias"}


def test_code_in_a_pickle_does_not_run(path, tmp_path):
    torch.save({"a": Payload(tmp_path / "made")}, path)
    with pytest.raises(CheckpointError, match="objects other than tensors"):
        read_pickled(path)
    assert not (tmp_path / "made").exists()


def test_a_truncated_file(path):
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is truncated or not a PyTorch file"):
        read_pickled(path)


@pytest.mark.parametrize("content", [b"", b"not a pickle at all"])
def test_a_file_of_something_else(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read_pickled(path)


def test_something_else_than_a_state_dict(path):
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        read_pickled(path)


def test_the_old_format(path):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format before PyTorch 1\.6"):
        read_pickled(path)


def test_a_strided_view(path):
    torch.save({"a": torch.ones(4, 4)[:, ::2]}, path)
    with pytest.raises(CheckpointError, match=r"'a' in .* is a strided view"):
        read_pickled(path)
