"""Which decoder blocks of a model are the same program on different weights.

Tracing costs about a second per layer, so only one block of each type is traced. Two blocks have one type
when their module trees agree in classes, tensor names and shapes, scalar attributes and per-layer config
entries; nothing is assumed about names of layers or architectures.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rotexport.errors import UnsupportedModelError

_POSITIONAL = ("layer_idx", "layer_id", "layer_number", "block_idx")


@dataclass(frozen=True)
class BlockPlan:
    """How a model is assembled from few traced blocks.

    `config` describes a model that holds one block of each type; block `layer` of the whole model is a copy
    of traced block `source[layer]`.
    """

    config: PretrainedConfig
    source: tuple[int, ...]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the state-dict prefix and the list of decoder blocks."""
    count = model.config.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(found)} lists of {count} modules, not one of decoder blocks"
        )
    return found[0]


def plan_blocks(model: PreTrainedModel) -> BlockPlan:
    """Group the decoder blocks of a model by type, in order of first appearance."""
    config = model.config
    _, layers = decoder_layers(model)
    types: dict[Hashable, int] = {}
    firsts: list[int] = []
    source: list[int] = []
    for index, layer in enumerate(layers):
        signature = (_signature(layer), _layer_entries(config, index))
        if signature not in types:
            types[signature] = len(types)
            firsts.append(index)
        source.append(types[signature])
    return BlockPlan(_with_layers(config, firsts), tuple(source))


def same_blocks(model: PreTrainedModel, plan: BlockPlan, truncated: PreTrainedModel) -> bool:
    """Tell whether the truncated model really holds the planned blocks and everything around them."""
    _, whole = decoder_layers(model)
    _, parts = decoder_layers(truncated)
    blocks = all(_signature(whole[i]) == _signature(parts[source]) for i, source in enumerate(plan.source))
    return blocks and _surroundings(model) == _surroundings(truncated)


def _signature(module: nn.Module) -> Hashable:
    return tuple((name, type(part).__qualname__, _contents(part)) for name, part in module.named_modules())


def _contents(module: nn.Module) -> Hashable:
    parameters = tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters(recurse=False))
    buffers = tuple((name, _values(tensor)) for name, tensor in module.named_buffers(recurse=False))
    scalars = tuple(
        (name, repr(value))
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in _POSITIONAL and _is_plain(value)
    )
    return parameters, buffers, scalars


def _values(buffer: torch.Tensor) -> Hashable:
    """Return what a computed buffer holds; one that stands for a stored tensor holds nothing."""
    hollow = buffer.untyped_storage().nbytes() < buffer.nbytes
    return tuple(buffer.shape), None if hollow else buffer.numpy().tobytes()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _surroundings(model: PreTrainedModel) -> Hashable:
    prefix, _ = decoder_layers(model)
    return tuple(
        (name, tuple(tensor.shape))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not name.startswith(f"{prefix}.")
    )


def _layer_lists(config: PretrainedConfig) -> dict[str, list[Any]]:
    count = config.num_hidden_layers
    fields = config.to_dict().items()
    return {name: list(v) for name, v in fields if isinstance(v, (list, tuple)) and len(v) == count}


def _layer_entries(config: PretrainedConfig, index: int) -> Hashable:
    return tuple((name, repr(values[index])) for name, values in sorted(_layer_lists(config).items()))


def _with_layers(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    """Return a copy of `config` that describes only the given layers."""
    fields = copy.deepcopy(config.to_dict())
    for name, values in _layer_lists(config).items():
        fields[name] = [values[index] for index in layers]
    # attribute_map: the config's own spelling ("n_layer") of the standard name.
    count = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    fields[count] = len(layers)
    return type(config).from_dict(fields)
