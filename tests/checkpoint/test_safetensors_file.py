"""Headers of safetensors files: what they describe, and what is refused before anything is read."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rotexport.checkpoint.safetensors_file import read_header
from rotexport.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)}, path)
    return path


def rewrite(path: Path, **entries: dict[str, object]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + length]) | entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def test_tensors_lie_where_the_header_says(path):
    tensors = read_header(path)
    np.testing.assert_array_equal(tensors["a"].read(), [[0, 1, 2], [3, 4, 5]])
    assert tensors["b"].shape == (5,)
    assert tensors["b"].dtype == np.float16


def test_scalars_and_empty_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float32)}, path)
    tensors = read_header(path)
    assert tensors["scalar"].read() == 3.5
    assert tensors["empty"].read().shape == (0, 4)


def test_a_file_cut_anywhere_is_refused(path):
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors (is truncated|has a corrupt header)"):
            read_header(path)


def test_a_git_lfs_pointer_is_named(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(path)


def test_bytes_that_do_not_fit_the_shape(path):
    rewrite(path, a={"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 24]})
    with pytest.raises(CheckpointError, match=r"'a' of type F32 and shape \[2, 4\] cannot occupy 24 bytes"):
        read_header(path)


def test_an_unknown_type(path):
    rewrite(path, a={"dtype": "F4_E2M1", "shape": [2, 3], "data_offsets": [0, 24]})
    with pytest.raises(CheckpointError, match=r"'a' in .* has type 'F4_E2M1'; pass the model in float32"):
        read_header(path)


def test_entries_without_their_fields(path):
    rewrite(path, a={"dtype": "F32"})
    with pytest.raises(CheckpointError, match="corrupt header"):
        read_header(path)
