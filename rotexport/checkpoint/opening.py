"""One entrance for every kind of model."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PreTrainedModel

from rotexport.checkpoint.checkpoint import Checkpoint
from rotexport.checkpoint.gguf_model import open_gguf
from rotexport.checkpoint.hub import download
from rotexport.checkpoint.huggingface import open_directory
from rotexport.checkpoint.memory import open_loaded
from rotexport.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def open_checkpoint(model: str | Path | PreTrainedModel, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model without reading its weights.

    Args:
        model: a Hugging Face directory (safetensors or `.bin`, sharded or not), a `.gguf` file, a hub id,
            or a model that transformers has loaded.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        CheckpointError: the model is missing, incomplete, corrupt, or in a form that is not read.
        UnsupportedModelError: it is not a causal language model that transformers knows.
    """
    if isinstance(model, PreTrainedModel):
        return open_loaded(model)
    try:
        return _open_path(str(model), trust_remote_code)
    except OSError as error:
        raise CheckpointError(f"{model} cannot be read: {error.strerror} ({error.filename})") from error


def _open_path(model: str, trust_remote_code: bool) -> Checkpoint:
    path = Path(model).expanduser()
    if path.is_dir():
        return open_directory(path, trust_remote_code)
    if path.is_file():
        return _open_file(path)
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(model):
        return open_directory(download(model, with_code=trust_remote_code), trust_remote_code)
    raise CheckpointError(
        f"{model} does not exist; give a model directory, a .gguf file or a hub id such as 'owner/name'"
    )


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        return open_gguf(path)
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise CheckpointError(f"{path} is one file of a model; give its directory, {path.parent}")
    raise CheckpointError(f"{path} is not a model; give a model directory, a .gguf file or a hub id")
