"""The reference equals the model it came from bit for bit, resident or streamed, in bounded memory."""

import pytest
import torch
from support.tiny import tiny_model
from transformers import DynamicCache, PreTrainedModel

from rotexport.checkpoint import open_checkpoint
from rotexport.reference import reference_model

TOKENS = torch.arange(20).reshape(2, 10) * 7 % 96
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt", "gpt2", "phi3"]


def run(model: PreTrainedModel) -> list[torch.Tensor]:
    """Run a left-padded prompt, then one more token from the cache; return all there is to compare."""
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        first = model(
            TOKENS, attention_mask=mask, past_key_values=cache, use_cache=True, output_hidden_states=True
        )
        longer = torch.cat([mask, mask[:, -1:]], 1)
        step = model(TOKENS[:, :1], attention_mask=longer, past_key_values=cache, use_cache=True)
    return [first.logits, *first.hidden_states, step.logits]


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["resident", "streamed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_the_original(tmp_path, architecture, limit):
    original = tiny_model(architecture)
    original.save_pretrained(tmp_path)
    reference = reference_model(open_checkpoint(tmp_path), limit)
    assert not reference.training
    for expected, actual in zip(run(original), run(reference), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["resident", "streamed"])
def test_half_precision_weights_are_computed_with_in_float32(tmp_path, limit):
    original = tiny_model("llama", torch.bfloat16, tie_word_embeddings=True)
    original.save_pretrained(tmp_path)
    reference = reference_model(open_checkpoint(tmp_path), limit)
    for expected, actual in zip(run(original.float()), run(reference), strict=True):
        assert torch.equal(expected, actual)


def test_a_loaded_model_is_left_alone():
    original = tiny_model("llama")
    reference = reference_model(open_checkpoint(original))
    with torch.no_grad():
        reference.model.norm.weight.zero_()
    assert original.model.norm.weight.abs().max() > 0


def test_scaled_rotary_embeddings(tmp_path):
    """Inverse frequencies are computed, not stored: the meta device must not lose them."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    original = tiny_model("llama", rope_parameters=rope)
    original.save_pretrained(tmp_path)
    reference = reference_model(open_checkpoint(tmp_path), 0)
    assert torch.equal(run(original)[0], run(reference)[0])


def test_parameters_are_dropped_when_a_module_fails(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    reference = reference_model(open_checkpoint(tmp_path), 0)
    with pytest.raises(IndexError), torch.no_grad():
        reference(torch.tensor([[1000]]))
    assert all(parameter.is_meta for parameter in reference.parameters())


def test_a_streamed_model_holds_one_module_at_a_time(tmp_path):
    """Memory is bounded by the largest module, however many there are."""
    tiny_model("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    reference = reference_model(open_checkpoint(tmp_path), 0)
    held = []

    def record(*_: object) -> None:
        held.append([name for name, parameter in reference.named_parameters() if not parameter.is_meta])

    for module in reference.modules():
        if module._parameters:
            module.register_forward_pre_hook(record)
    with torch.no_grad():
        reference(TOKENS)
    owners = [{name.rpartition(".")[0] for name in names} for names in held]
    assert len(owners) == 4 * 9 + 3  # seven matrices and two norms a block; embedding, last norm, head
    assert all(len(owner) == 1 for owner in owners)
