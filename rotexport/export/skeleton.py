"""Models that can be traced but hold nothing: the right modules, real computed buffers and no storage.

A parameter is one element seen through strides of zero, so the modules of an 8-billion-parameter model take
megabytes and can still be traced as ordinary CPU tensors.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rotexport.checkpoint.skeleton import skeleton
from rotexport.errors import UnsupportedModelError

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def hollow_model(config: PretrainedConfig, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    """Build the causal language model that `config` describes, in evaluation mode, without its weights.

    Args:
        config: left unchanged.
        attention: name of a registered transformers attention implementation.
        trust_remote_code: whether code that comes with the model may define it.

    Raises:
        UnsupportedModelError: the architecture is not a decoder that this exporter can treat.

    """
    check_supported(config)
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    model = skeleton(config, trust_remote_code)
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} computes attention outside transformers' attention interface, "
            "so its attention cannot be exported"
        )
    _hollow_parameters(model)
    return model


def check_supported(config: PretrainedConfig) -> None:
    """Refuse architectures that have no canonical form, from the config alone."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"'{kind}' is an encoder-decoder; only decoders are exported")
    for name in _EXPERT_COUNTS:
        if (getattr(config, name, 0) or 0) > 1:
            raise UnsupportedModelError(
                f"'{kind}' routes tokens to experts ({name}={getattr(config, name)}); "
                "mixture-of-experts layers are not exported"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") == "dynamic":
            raise UnsupportedModelError(
                f"'{kind}' has dynamic RoPE, whose frequencies change with the length of the text; "
                "set rope_type in its config to one with fixed frequencies ('linear', 'yarn', 'llama3')"
            )


def _hollow_parameters(model: nn.Module) -> None:
    """Replace meta parameters and stored buffers by storage-free CPU tensors; tied ones stay tied."""
    hollow: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                stand_in = nn.Parameter(_hollow(parameter), requires_grad=False)
                module._parameters[name] = hollow.setdefault(id(parameter), stand_in)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _hollow(buffer)


def _hollow(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=like.dtype).expand(like.shape)
