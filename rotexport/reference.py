"""The PyTorch model that everything is measured against, within bounded memory.

A model that fits is held in float32 as usual. A larger one is streamed: every module that owns parameters
reads them just before it runs and drops them right after, so that memory holds one module's parameters at a
time, however deep the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rotexport.checkpoint.checkpoint import Checkpoint
from rotexport.graph.weights import SLAB_ELEMENTS, Weight


def reference_model(checkpoint: Checkpoint, max_resident_bytes: int = 1 << 30) -> PreTrainedModel:
    """Return the float32 PyTorch model of `checkpoint` in evaluation mode.

    Both kinds compute the same, bit for bit.

    Args:
        checkpoint: the opened model.
        max_resident_bytes: float32 bytes of parameters above which they are streamed.
    """
    model = checkpoint.skeleton()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, leaf = _owner(model, name)
            owner._buffers[leaf] = _tensor(checkpoint.weight(name))
    if size <= max_resident_bytes:
        _load(model, checkpoint)
    else:
        _stream(model, checkpoint)
    return model


def _load(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give every parameter its values; tied ones stay one."""
    loaded: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in loaded:
            loaded[id(parameter)] = nn.Parameter(_tensor(checkpoint.weight(name)), requires_grad=False)
        owner, leaf = _owner(model, name)
        owner._parameters[leaf] = loaded[id(parameter)]


def _stream(model: nn.Module, checkpoint: Checkpoint) -> None:
    for path, module in model.named_modules():
        own = {
            leaf: checkpoint.weight(f"{path}.{leaf}" if path else leaf)
            for leaf, parameter in module._parameters.items()
            if parameter is not None
        }
        if own:
            _stream_module(module, own)


def _stream_module(module: nn.Module, weights: dict[str, Weight]) -> None:
    empty = dict(module._parameters)

    def fill(module: nn.Module, _: Any) -> None:
        for leaf, weight in weights.items():
            module._parameters[leaf] = nn.Parameter(_tensor(weight), requires_grad=False)

    def drop(module: nn.Module, *_: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop, always_call=True)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _tensor(weight: Weight) -> torch.Tensor:
    """Read a weight as a float32 tensor of its own, slab by slab: no second copy of the whole exists."""
    if not weight.shape or 0 in weight.mixes:
        return torch.from_numpy(np.array(weight.read(), np.float32))
    values = np.empty(weight.shape, np.float32)
    step = max(1, SLAB_ELEMENTS * weight.shape[0] // max(1, values.size))
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        values[start:stop] = weight.slab(0, start, stop).astype(weight.dtype, copy=False)
    return torch.from_numpy(values)
