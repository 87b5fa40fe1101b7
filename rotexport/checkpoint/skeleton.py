"""The model that a configuration describes, without its weights: names, shapes, ties and constants."""

from __future__ import annotations

import copy
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rotexport.errors import UnsupportedModelError


def skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the causal language model of `config` in float32, in evaluation mode.

    Parameters and persistent buffers are on the meta device; buffers that are computed and not stored,
    such as RoPE's inverse frequencies, are real.

    Raises:
        UnsupportedModelError: the configuration is not that of a causal language model, or transformers
            cannot build it.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # constructors of models raise anything on values they did not expect
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"transformers builds no causal language model from this {config.model_type!r} configuration "
            f"({reason}); check config.json, or pass --trust-remote-code if the model brings its own code"
        ) from error
    _compute_buffers(model)
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Map every further name of a parameter in the `state_dict` to its first name."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        source = first.setdefault(id(tensor), name)
        if source != name:
            ties[name] = source
    return ties


def _compute_buffers(model: PreTrainedModel) -> None:
    """Give modules with computed buffers real ones.

    transformers loads models on the meta device too, and relies on `_init_weights` to compute them then;
    on the parameters, still on the meta device, the call does nothing.
    """
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        for name in names:
            module._buffers[name] = torch.empty_like(cast(torch.Tensor, module._buffers[name]), device="cpu")
        if names:
            model._init_weights(module)
