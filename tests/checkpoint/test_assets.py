"""What travels with the weights: tokenizer, configurations, hashes of the sources."""

import hashlib
import json
from pathlib import Path

import pytest
from support.tiny import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from rotexport.checkpoint import open_checkpoint
from rotexport.errors import CheckpointError


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<unk>": 0, "to": 1, "be": 2, "or": 3, "not": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


@pytest.fixture
def complete(
    saved: tuple[PreTrainedModel, Path], tokenizer: PreTrainedTokenizerFast
) -> tuple[PreTrainedModel, Path]:
    tokenizer.save_pretrained(saved[1])
    return saved


def test_the_tokenizer_is_loaded_once(complete):
    checkpoint = open_checkpoint(complete[1])
    assert checkpoint.tokenizer()("to be or not")["input_ids"] == [1, 2, 3, 4]
    assert checkpoint.tokenizer() is checkpoint.tokenizer()


def test_a_model_without_a_tokenizer(saved):
    assert open_checkpoint(saved[1]).tokenizer() is None
    assert open_checkpoint(saved[0]).tokenizer() is None


def test_a_corrupt_tokenizer(complete):
    (complete[1] / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer in .* cannot be loaded"):
        open_checkpoint(complete[1]).tokenizer()


@pytest.mark.parametrize("loaded", [False, True])
def test_saved_assets_make_a_directory_transformers_reads(complete, tmp_path, loaded):
    model, directory = complete
    model.name_or_path = str(directory)  # as from_pretrained leaves it
    out = tmp_path / "out"
    open_checkpoint(model if loaded else directory).save_assets(out)
    assert AutoConfig.from_pretrained(out).hidden_size == 32
    restored = AutoTokenizer.from_pretrained(out)
    assert restored("to be or not")["input_ids"] == [1, 2, 3, 4]
    assert restored.chat_template == "{{ messages[0].content }}"
    assert (out / "generation_config.json").is_file()
    assert not list(out.glob("*.safetensors"))


def test_nothing_saved_names_the_directory_it_came_from(complete, tmp_path):
    """What is built on one machine is deployed on others."""
    open_checkpoint(complete[1]).save_assets(tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert str(complete[1]) not in file.read_text()


def test_the_settings_for_generation_are_kept(complete, tmp_path):
    path = complete[1] / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    open_checkpoint(complete[1]).save_assets(tmp_path / "out")
    assert (tmp_path / "out" / path.name).read_text() == path.read_text()


def test_fingerprint_of_files(complete):
    directory = complete[1]
    fingerprint = open_checkpoint(directory).fingerprint()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(fingerprint)
    for name, value in fingerprint.items():
        assert value == hashlib.sha256((directory / name).read_bytes()).hexdigest()


def test_fingerprint_of_a_loaded_model_follows_its_values():
    first, second = tiny_model("llama"), tiny_model("llama")
    assert open_checkpoint(first).fingerprint() == open_checkpoint(second).fingerprint()
    second.model.norm.weight.data[3] += 1
    assert open_checkpoint(first).fingerprint() != open_checkpoint(second).fingerprint()
