"""A tiny streaming build."""

from pathlib import Path

import pytest
from support.builds import streaming_build
from support.tiny import tiny_model
from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def tiny() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def streaming_model(tiny: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streaming_build(tiny, tmp_path_factory.mktemp("stream"))
