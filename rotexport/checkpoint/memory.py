"""Opening a model that transformers has already loaded."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import torch
from transformers import PreTrainedModel

from rotexport.checkpoint.assets import LoadedAssets
from rotexport.checkpoint.checkpoint import Checkpoint, assemble
from rotexport.checkpoint.skeleton import skeleton
from rotexport.errors import CheckpointError
from rotexport.graph.weights import InMemory


def open_loaded(model: PreTrainedModel) -> Checkpoint:
    """Open a loaded model; its parameters are shared, not copied, where they are on the CPU.

    Raises:
        CheckpointError: a parameter has no values or is quantized.
        UnsupportedModelError: the model is no causal language model.
    """
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError("the loaded model is already quantized; pass the float model it was made from")
    shared: dict[int, InMemory] = {}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors[name] = shared.setdefault(id(tensor), _weight(name, tensor))
    return assemble(config, skeleton(config), tensors, LoadedAssets(model))


def _weight(name: str, tensor: torch.Tensor) -> InMemory:
    if tensor.is_meta:
        raise CheckpointError(
            f"parameter {name!r} of the loaded model is on the meta device and has no values"
        )
    host = tensor.detach().cpu()
    if host.dtype == torch.bfloat16:
        return InMemory(host.contiguous().view(torch.int16).numpy().view(np.dtype(ml_dtypes.bfloat16)))
    return InMemory(host.numpy())
