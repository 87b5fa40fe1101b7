"""The entrance: which reader a model goes to, and what is no model at all."""

import errno
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from support.tiny import tiny_model

from rotexport.checkpoint import hub, open_checkpoint
from rotexport.errors import CheckpointError


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "a/b/c", "missing.gguf", "owner/missing.gguf"]
)
def test_a_path_that_does_not_exist(name):
    with pytest.raises(CheckpointError, match="does not exist; give a model directory"):
        open_checkpoint(name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_file_of_a_model(saved, name):
    with pytest.raises(CheckpointError, match=f"{name} is one file of a model; give its directory"):
        open_checkpoint(saved[1] / name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.md").write_text("# Notes")
    with pytest.raises(CheckpointError, match=r"notes\.md is not a model"):
        open_checkpoint(tmp_path / "notes.md")


def test_a_file_that_cannot_be_read(saved, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "model.safetensors")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read: Permission denied \(model\.safetensors\)"):
        open_checkpoint(saved[1])


def test_the_home_directory_is_expanded(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved[1].parent))
    assert open_checkpoint("~/llama").config.hidden_size == 32


# The hub is replaced: tests reach no network.


def serve(monkeypatch, answer):
    """Let `answer(repository, patterns)` stand for huggingface_hub; return the list of asked patterns."""
    asked = []

    def snapshot(repository, allow_patterns):
        asked.append(allow_patterns)
        return answer(repository)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return asked


def test_a_hub_model_is_opened_from_its_snapshot(saved, monkeypatch):
    asked = serve(monkeypatch, lambda repository: {"owner/tiny": saved[1]}[repository])
    weight = open_checkpoint("owner/tiny").weight("model.norm.weight")
    np.testing.assert_array_equal(weight.read(), saved[0].model.norm.weight.detach())
    assert len(asked) == 1
    assert not {"*.bin", "*.py"} & set(asked[0]), "neither pickles nor code are fetched without need"


def test_code_is_fetched_only_when_trusted(saved, monkeypatch):
    asked = serve(monkeypatch, lambda _: saved[1])
    open_checkpoint("owner/tiny", trust_remote_code=True)
    assert "*.py" in asked[0]


def test_pickles_are_fetched_where_there_are_no_safetensors(saved, monkeypatch):
    (saved[1] / "model.safetensors").unlink()
    asked = serve(monkeypatch, lambda _: saved[1])
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint("owner/tiny")
    assert "*.bin" in asked[1]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, "neither a local path nor a hub model"),
        (GatedRepoError, "is gated: accept its terms"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, message):
    def refuse(_):
        raise error.__new__(error)

    serve(monkeypatch, refuse)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("owner/tiny")


def test_offline_without_the_model_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="not in the hub cache, and the hub cannot be reached"):
        open_checkpoint("owner/model-that-is-not-cached")


def test_a_loaded_model_is_opened_too():
    assert open_checkpoint(tiny_model("llama")).config.hidden_size == 32
