"""Tokenizer and configuration files, from wherever the model came."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rotexport.checkpoint.checkpoint import Assets
from rotexport.errors import CheckpointError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class DirectoryAssets(Assets):
    """A Hugging Face directory, whose files are copied as they are."""

    directory: Path
    weight_files: tuple[Path, ...]
    trust_remote_code: bool

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Load the tokenizer; None when the directory has none of a tokenizer's files."""
        if not self._tokenizer_files():
            return None
        return read_tokenizer(AutoTokenizer, self.directory, trust_remote_code=self.trust_remote_code)

    def save(self, directory: Path, config: PretrainedConfig) -> None:
        """Copy the tokenizer's and generation files; write the configuration."""
        generation = self.directory / "generation_config.json"
        save_configs(directory, config, GenerationConfig.from_model_config(config))
        code = sorted(self.directory.glob("*.py")) if self.trust_remote_code else []
        for file in [*self._tokenizer_files(), *filter(Path.is_file, [generation]), *code]:
            shutil.copyfile(file, directory / file.name)

    def fingerprint(self) -> dict[str, str]:
        """Hash `config.json`, the weight files and the tokenizer's."""
        return hash_files([self.directory / "config.json", *self.weight_files, *self._tokenizer_files()])

    def _tokenizer_files(self) -> list[Path]:
        named = [self.directory / name for name in _TOKENIZER_FILES]
        return [path for path in named if path.is_file()] + sorted(self.directory.glob("*.tiktoken"))


@dataclass(frozen=True)
class GgufAssets(Assets):
    """A GGUF file, which holds the tokenizer as metadata."""

    path: Path

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Rebuild the tokenizer from the file's metadata.

        Not through AutoTokenizer, which would spend seconds on finding the class: of a GGUF file, every
        tokenizer is one of the `tokenizers` library.
        """
        return read_tokenizer(PreTrainedTokenizerFast, self.path.parent, gguf_file=self.path.name)

    def save(self, directory: Path, config: PretrainedConfig) -> None:
        """Write the rebuilt tokenizer and configuration as Hugging Face files."""
        save_configs(directory, config, GenerationConfig.from_model_config(config))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    def fingerprint(self) -> dict[str, str]:
        """Hash the file."""
        return hash_files([self.path])


@dataclass(frozen=True, eq=False)
class LoadedAssets(Assets):
    """A model in memory; its tokenizer is looked up where the model says it was loaded from."""

    model: PreTrainedModel

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Load the tokenizer from the model's `name_or_path`, never from the network; None if not there."""
        origin = self.model.name_or_path
        if not origin:
            return None
        try:
            return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(origin, local_files_only=True))
        except (OSError, ValueError, KeyError, TypeError, ImportError):
            return None

    def save(self, directory: Path, config: PretrainedConfig) -> None:
        """Write configuration, generation configuration and, where there is one, the tokenizer."""
        save_configs(directory, config, self.model.generation_config)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    def fingerprint(self) -> dict[str, str]:
        """Hash names, types, shapes and elements of the whole `state_dict`."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return {"state_dict": digest.hexdigest()}


def read_tokenizer(kind: Any, directory: Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer, of class `kind`, from `directory`.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    try:
        tokenizer = kind.from_pretrained(directory, **options)
    except Exception as error:  # tokenizers raises bare Exception on a corrupt file
        raise CheckpointError(
            f"the tokenizer in {directory / options.get('gguf_file', '')} cannot be loaded "
            f"({_first_line(error)}); download its files again"
        ) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def save_configs(directory: Path, config: PretrainedConfig, generation: GenerationConfig | None) -> None:
    """Write `config.json` and `generation_config.json`, without the path the model was read from."""
    portable = copy.deepcopy(config)
    portable.name_or_path = ""
    portable.save_pretrained(directory)
    if generation is not None:
        generation.save_pretrained(directory)


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file by its name, reading a megabyte at a time."""
    hashes = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        hashes[path.name] = digest.hexdigest()
    return hashes


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
