"""Models that transformers has already loaded."""

import numpy as np
import pytest
import torch
from support.tiny import tiny_model
from transformers import BertConfig, BertModel

from rotexport.checkpoint import open_checkpoint
from rotexport.errors import CheckpointError, UnsupportedModelError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_are_shared_not_copied(dtype):
    model = tiny_model("llama", dtype)
    checkpoint = open_checkpoint(model)
    assert list(checkpoint.names()) == list(model.state_dict())
    array = checkpoint.weight("model.norm.weight").read()
    np.testing.assert_array_equal(array.astype(np.float32), model.model.norm.weight.detach().float())
    assert array.ctypes.data == model.model.norm.weight.data_ptr()


def test_tied_parameters_share_one_weight():
    checkpoint = open_checkpoint(tiny_model("llama", tie_word_embeddings=True))
    assert checkpoint.weight("lm_head.weight") is checkpoint.weight("model.embed_tokens.weight")


def test_the_model_keeps_its_configuration():
    """A head replaced after loading makes the embeddings untied, for the checkpoint alone."""
    model = tiny_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.ones(96, 32))
    assert not open_checkpoint(model).config.tie_word_embeddings
    assert model.config.tie_word_embeddings


def test_experts_are_read_as_the_model_has_them():
    """From files they are refused: transformers stacks them on loading."""
    model = tiny_model("mixtral", num_local_experts=2)
    assert set(open_checkpoint(model).names()) == set(model.state_dict())


def test_a_model_without_values_is_refused():
    with pytest.raises(CheckpointError, match="on the meta device"):
        open_checkpoint(tiny_model("llama").to("meta"))


def test_a_quantized_parameter_is_refused():
    model = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.ones(96, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is stored as int8"):
        open_checkpoint(model)


def test_an_encoder_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        open_checkpoint(BertModel(BertConfig(vocab_size=32, **sizes)))


def test_an_unknown_name():
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nothing'"):
        open_checkpoint(tiny_model("llama")).weight("model.nothing")
