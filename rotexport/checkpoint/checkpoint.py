"""What every kind of model file becomes: a configuration, lazy weights by name, and its assets."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rotexport.checkpoint.names import complete
from rotexport.checkpoint.skeleton import skeleton, tied_names
from rotexport.errors import CheckpointError
from rotexport.graph.weights import Weight


class Assets(ABC):
    """What travels with the weights: the tokenizer, the generation configuration, the files themselves."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, loaded at the first use; None when the model comes without one."""
        return self.load_tokenizer()

    @abstractmethod
    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Load the tokenizer; None when the model comes without one."""

    @abstractmethod
    def save(self, directory: Path, config: PretrainedConfig) -> None:
        """Write everything a deployed model needs besides its graph into `directory`."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of every source, in hexadecimal, by file name."""


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model on disk or in memory, none of whose weights has been read.

    Attributes:
        config: the configuration; of the text part, where the model is multimodal.
        weights: a lazy tensor for every name in the model's `state_dict`, shapes checked. Names that
            are tied share one.
        assets: the tokenizer and the files.
        trust_remote_code: whether code that comes with the model may define it.
    """

    config: PretrainedConfig
    weights: Mapping[str, Weight]
    assets: Assets
    trust_remote_code: bool = False

    def names(self) -> Iterable[str]:
        """Iterate over the names in the model's `state_dict`, in its order."""
        return self.weights.keys()

    def weight(self, name: str) -> Weight:
        """Return the lazy tensor called `name` in the model's `state_dict`."""
        if name not in self.weights:
            raise CheckpointError(f"the model has no tensor {name!r}; its names are those of `names()`")
        return self.weights[name]

    def skeleton(self) -> PreTrainedModel:
        """Return a fresh float32 PyTorch model with parameters on the meta device (see `skeleton.py`)."""
        return skeleton(self.config, self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer, loaded once; None when the model comes without one."""
        return self.assets.tokenizer

    def save_assets(self, directory: Path) -> None:
        """Write tokenizer, chat template, `config.json` and `generation_config.json` into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        self.assets.save(directory, self.config)

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of every source, in hexadecimal, by file name."""
        return self.assets.fingerprint()


def assemble(
    config: PretrainedConfig,
    model: PreTrainedModel,
    tensors: Mapping[str, Weight],
    assets: Assets,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Check `tensors`, by model name, against the skeleton `model` of `config`, and settle what is tied.

    A checkpoint may store two different tensors that its configuration calls tied; transformers then
    keeps both, and so does this: the returned configuration says that they are not tied.

    Raises:
        CheckpointError: a tensor is missing, left over, or of the wrong shape or type.
    """
    ties = tied_names(model)
    weights = complete(model, tensors, ties)
    checkpoint = Checkpoint(config, weights, assets, trust_remote_code)
    if all(weights[name] == weights[source] for name, source in ties.items()):
        return checkpoint
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    return replace(checkpoint, config=untied)
