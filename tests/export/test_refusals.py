"""What is not exported is refused with the piece named, before long work."""

from typing import Any

import pytest
from transformers import AutoConfig

from rotexport.errors import UnsupportedModelError
from rotexport.export.skeleton import hollow_model
from rotexport.export.trace import ATTENTION, register_interfaces, trace

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({"num_layers": 1, "vocab_size": 64}, "'t5' is an encoder-decoder"),
    "mixtral": (SMALL, r"'mixtral' routes tokens to experts \(num_experts=8\)"),
    "bloom": (
        {"n_layer": 1, "hidden_size": 32, "n_head": 4, "vocab_size": 64},
        "outside transformers' attention",
    ),
    "mamba": (
        {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 64},
        "outside transformers' attention",
    ),
    "llama": (SMALL | {"rope_parameters": DYNAMIC}, "'llama' has dynamic RoPE"),
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_interfaces()


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_without_a_canonical_form_is_refused(kind: str) -> None:
    fields, message = REFUSED[kind]
    with pytest.raises(UnsupportedModelError, match=message):
        hollow_model(AutoConfig.for_model(kind, **fields), ATTENTION, trust_remote_code=False)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("bert", {"intermediate_size": 64}, "BertSelfAttention attends in both directions"),
        ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 8}, "mask of its own"),
    ],
)
def test_attention_that_is_not_causal_is_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    model = hollow_model(AutoConfig.for_model(kind, **SMALL | fields), ATTENTION, trust_remote_code=False)
    with pytest.raises(UnsupportedModelError, match=message):
        trace(model)


def test_a_hollow_model_holds_no_memory_and_stays_tied() -> None:
    config = AutoConfig.for_model("llama", **SMALL | {"hidden_size": 4096, "tie_word_embeddings": True})
    model = hollow_model(config, ATTENTION, trust_remote_code=False)
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < 1000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (64, 4096)
    assert model.model.rotary_emb.inv_freq[0] == 1.0  # computed, not hollow
