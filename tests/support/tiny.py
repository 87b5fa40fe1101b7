"""Tiny random models of several architectures."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PARTICULARS = {
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "qwen3": {"head_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "phi3": {"pad_token_id": 0},
}


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **fields: object) -> PreTrainedModel:
    """Build a random model: `tiny_model("llama", tie_word_embeddings=True)`."""
    torch.manual_seed(0)
    sizes = {} if model_type == "gpt2" else SIZES
    vocabulary = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **vocabulary | sizes | PARTICULARS.get(model_type, {}) | fields)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide a wrong norm
            torch.nn.init.normal_(parameter, std=0.5)
    return model
