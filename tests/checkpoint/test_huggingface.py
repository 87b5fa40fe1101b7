"""Hugging Face directories: what is read equals what transformers saved, and every defect has its message."""

import json
import re
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, MixtralConfig, MixtralForCausalLM

from rotexport.checkpoint import Checkpoint, open_checkpoint
from rotexport.errors import CheckpointError, UnsupportedModelError


def assert_same_weights(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    state = model.state_dict()
    assert list(checkpoint.names()) == list(state)
    for name, tensor in state.items():
        weight = checkpoint.weight(name)
        assert weight.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(weight.read().astype(np.float32), tensor.float().numpy(), err_msg=name)


def edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove stored tensors; names with `__` for dots."""
    path = directory / "model.safetensors"
    state = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt", "gpt2", "phi3"]
)
def test_a_saved_model_is_read_back(tmp_path, model_type):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    assert_same_weights(open_checkpoint(tmp_path), model)


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)]
)
def test_half_precision_stays_as_stored(tmp_path, dtype, stored):
    model = tiny_model("llama", dtype)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weight("lm_head.weight").dtype == np.dtype(stored)
    assert_same_weights(checkpoint, model)


def test_shards(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(open_checkpoint(tmp_path), model)


def test_pickled_weights(saved):
    model, directory = saved
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    assert_same_weights(open_checkpoint(directory), model)


def test_pickled_shards(saved):
    model, directory = saved
    (directory / "model.safetensors").unlink()
    state = model.state_dict()
    shards = {name: f"pytorch_model-{1 + ('layers.1' in name)}.bin" for name in state}
    for shard in set(shards.values()):
        torch.save({name: state[name] for name in state if shards[name] == shard}, directory / shard)
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert_same_weights(open_checkpoint(directory), model)


def test_a_base_model_with_tied_embeddings_is_a_whole_model(tmp_path):
    """`LlamaModel.save_pretrained` writes names without the prefix `model.` and no head."""
    model = tiny_model("llama", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_weights(open_checkpoint(tmp_path), model)


def test_tied_names_share_one_weight(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weight("lm_head.weight") is checkpoint.weight("model.embed_tokens.weight")
    assert checkpoint.config.tie_word_embeddings


def test_two_tensors_stored_for_one_tie_are_both_kept(saved):
    """As transformers does: the configuration says tied, the file holds a head of its own."""
    model, directory = saved
    edit_config(directory, tie_word_embeddings=True)
    checkpoint = open_checkpoint(directory)
    assert not checkpoint.config.tie_word_embeddings
    assert_same_weights(checkpoint, model)


def test_computed_constants_of_old_checkpoints_are_ignored(saved):
    model, directory = saved
    edit_tensors(directory, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert_same_weights(open_checkpoint(directory), model)


def test_the_language_model_of_a_multimodal_one(tmp_path):
    text = tiny_model("gemma3_text").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.model_type == "gemma3_text"
    embedding = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(checkpoint.weight("model.embed_tokens.weight").read(), embedding)


def test_opening_reads_no_weights(tmp_path):
    """Of a 64 GB file with a hole where the weights belong, only the header is touched."""
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    edit_config(tmp_path, vocab_size=1 << 28, tie_word_embeddings=True)
    edit_tensors(tmp_path, lm_head__weight=None, model__embed_tokens__weight=None)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = len(raw) - 8 - length
    size = (1 << 28) * 32 * 4
    header["model.embed_tokens.weight"] = {
        "dtype": "F32",
        "shape": [1 << 28, 32],
        "data_offsets": [end, end + size],
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        file.truncate(file.tell() + size)
    before = anonymous_bytes()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weight("lm_head.weight").slab(0, 7, 9).shape == (2, 32)
    assert anonymous_bytes() - before < 50e6


def anonymous_bytes() -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    return 1024.0 * int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])


# What is refused, and how it is said.


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json.*give a model directory"):
        open_checkpoint(tmp_path)


def test_a_directory_of_gguf_files(tmp_path):
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(CheckpointError, match=r"give one of its GGUF files, such as tiny\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_corrupt_config(saved, text):
    _, directory = saved
    (directory / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        open_checkpoint(directory)


def test_a_config_without_weights(saved):
    _, directory = saved
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights \(looked for model\.safetensors, "):
        open_checkpoint(directory)


def test_an_unknown_model_type(saved):
    _, directory = saved
    edit_config(directory, model_type="frobnicator")
    with pytest.raises(UnsupportedModelError, match=r"'frobnicator'.*--trust-remote-code"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "t5"},
        {
            "model_type": "encoder-decoder",
            "encoder": {"model_type": "bert"},
            "decoder": {"model_type": "bert"},
        },
    ],
)
def test_no_causal_language_model(saved, fields):
    _, directory = saved
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModelError, match=f"'{fields['model_type']}'"):
        open_checkpoint(directory)


def test_an_illegal_value(saved):
    _, directory = saved
    edit_config(directory, num_attention_heads="many")
    with pytest.raises(
        CheckpointError, match=r"'num_attention_heads' expected int, got str \(value: 'many'\)"
    ):
        open_checkpoint(directory)


def test_an_already_quantized_model(saved):
    _, directory = saved
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"already quantized \('gptq'\).*float model"):
        open_checkpoint(directory)


def test_a_missing_shard(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of .*the first being {shard.name}"):
        open_checkpoint(tmp_path)


def test_a_shard_outside_the_directory(tmp_path):
    """An index is data from a stranger: it may name files of its own directory only."""
    inside = tmp_path / "inside"
    tiny_model("llama").save_pretrained(inside, max_shard_size="40KB")
    shard = sorted(inside.glob("model-*.safetensors"))[0]
    shutil.move(shard, tmp_path / shard.name)
    index = inside / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(CheckpointError, match="lacks 1 of "):
        open_checkpoint(inside)


def test_an_index_that_disagrees_with_its_shards(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("layers.1.mlp.up_proj", "layers.1.mlp.upward_proj"))
    with pytest.raises(CheckpointError, match=r"places tensor 'model\.layers\.1\.mlp\.upward_proj\.weight'"):
        open_checkpoint(tmp_path)


def test_a_missing_tensor(saved):
    _, directory = saved
    edit_tensors(directory, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"lacks tensors 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        open_checkpoint(directory)


def test_a_left_over_tensor(saved):
    """A bias that the configuration does not mention would otherwise be dropped in silence."""
    _, directory = saved
    edit_tensors(directory, model__layers__0__self_attn__q_proj__bias=torch.ones(32))
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.0\.self_attn\.q_proj\.bias', which the Llama"
    ):
        open_checkpoint(directory)


def test_a_tensor_of_the_wrong_shape(saved):
    _, directory = saved
    edit_config(directory, intermediate_size=128)
    with pytest.raises(
        CheckpointError, match=r"gate_proj\.weight' has shape \[64, 32\].* asks for \[128, 32\]"
    ):
        open_checkpoint(directory)


def test_a_tensor_of_the_wrong_type(saved):
    _, directory = saved
    edit_tensors(directory, lm_head__weight=torch.ones(96, 32).to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is stored as float8_e4m3fn"):
        open_checkpoint(directory)


def test_tensors_that_transformers_rearranges(tmp_path):
    """Mixtral stores one matrix per expert; its model has them stacked."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="pass the model object instead"):
        open_checkpoint(tmp_path)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
(Path({directory!r}) / "ran").touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(saved, monkeypatch, tmp_path):
    """A model that brings its own code, which leaves a file behind when it runs."""
    model, directory = saved
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers appends its module cache
    (directory / "own.py").write_text(CODE.format(directory=str(directory)))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_config(directory, model_type="own", auto_map=auto_map)
    return model, directory


def test_code_of_a_model_does_not_run_by_default(own_code):
    _, directory = own_code
    with pytest.raises(UnsupportedModelError, match=r"'own'.*--trust-remote-code"):
        open_checkpoint(directory)
    assert not (directory / "ran").exists()


def test_code_of_a_model_runs_when_trusted(own_code):
    model, directory = own_code
    assert_same_weights(open_checkpoint(directory, trust_remote_code=True), model)
    assert (directory / "ran").exists()
