"""Which blocks count as the same."""

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    SmolLM3Config,
)

from rotexport.checkpoint.skeleton import skeleton
from rotexport.errors import UnsupportedModelError
from rotexport.export.blocks import decoder_layers, plan_blocks, same_blocks

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
SLIDING_THEN_FULL = ["sliding_attention"] * 5 + ["full_attention"]

CONFIGS: list[tuple[PretrainedConfig, tuple[int, ...]]] = [
    (LlamaConfig(num_hidden_layers=30, intermediate_size=64, **SMALL), (0,) * 30),
    (
        Gemma3TextConfig(num_hidden_layers=6, layer_types=SLIDING_THEN_FULL, intermediate_size=64, **SMALL),
        (0, 0, 0, 0, 0, 1),
    ),
    (
        Qwen2Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=2, **SMALL),
        (0, 0, 1, 1),
    ),
    (
        SmolLM3Config(num_hidden_layers=6, no_rope_layer_interval=3, pad_token_id=0, **SMALL),
        (0, 0, 1, 0, 0, 1),
    ),
    (OPTConfig(num_hidden_layers=5, ffn_dim=64, word_embed_proj_dim=32, **SMALL), (0,) * 5),
]


@pytest.mark.parametrize(("config", "expected"), CONFIGS, ids=lambda value: getattr(value, "model_type", ""))
def test_one_block_of_each_kind_is_planned(config: PretrainedConfig, expected: tuple[int, ...]) -> None:
    model = skeleton(config)
    plan = plan_blocks(model)
    assert plan.source == expected
    assert plan.config.num_hidden_layers == max(expected) + 1
    assert config.num_hidden_layers == len(expected)  # the model's own config is left alone
    assert same_blocks(model, plan, skeleton(plan.config))


def test_a_block_with_a_changed_scalar_is_a_kind_of_its_own() -> None:
    model = skeleton(CONFIGS[0][0])
    _, layers = decoder_layers(model)
    layers[7].self_attn.scaling *= 2
    assert plan_blocks(model).source == (0,) * 7 + (1,) + (0,) * 22


def test_a_block_with_a_different_computed_buffer_is_a_kind_of_its_own() -> None:
    model = skeleton(CONFIGS[0][0])
    _, layers = decoder_layers(model)
    for number, layer in enumerate(layers):
        layer.self_attn.register_buffer("slope", torch.tensor([float(number > 27)]), persistent=False)
    assert plan_blocks(model).source == (0,) * 28 + (1,) * 2


def test_a_truncated_model_with_other_blocks_is_noticed() -> None:
    model = skeleton(CONFIGS[0][0])
    plan = plan_blocks(model)
    wider = skeleton(LlamaConfig(num_hidden_layers=1, intermediate_size=96, **SMALL))
    assert not same_blocks(model, plan, wider)


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    model = skeleton(MixtralConfig(num_hidden_layers=2, intermediate_size=64, **SMALL))
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(UnsupportedModelError, match="0 lists of 2 modules"):
        decoder_layers(model)
