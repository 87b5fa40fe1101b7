"""A saved tiny model."""

from pathlib import Path

import pytest
from support.tiny import tiny_model
from transformers import PreTrainedModel


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A tiny Llama and the directory it was saved to."""
    model = tiny_model("llama")
    directory = tmp_path / "llama"
    model.save_pretrained(directory)
    return model, directory
