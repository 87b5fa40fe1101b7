"""Fetching a model from the Hugging Face hub, or from its cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from rotexport.errors import CheckpointError

_ASSETS = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def download(repository: str, *, with_code: bool) -> Path:
    """Return the local directory of a hub model, downloading what is not in the cache yet.

    Pickled weights are fetched only where there are no safetensors, Python files only `with_code`.

    Raises:
        CheckpointError: the repository does not exist, is gated, or cannot be reached.
    """
    patterns = _ASSETS + (["*.py"] if with_code else [])
    directory = _snapshot(repository, [*patterns, "*.safetensors"])
    if not any(directory.glob("*.safetensors")):
        directory = _snapshot(repository, [*patterns, "*.bin"])
    return directory


def _snapshot(repository: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(f"{repository} is gated: accept its terms and run `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{repository} is neither a local path nor a hub model you may see; check the spelling"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repository} is not a local path, is not in the hub cache, and the hub cannot be reached "
            f"({type(error).__name__}); give a local directory or .gguf file"
        ) from error
