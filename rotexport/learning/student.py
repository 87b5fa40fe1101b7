"""A block with learned quantizers on everything its plan quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rotexport.blocks.torch_block import Edit, Edits, TorchBlock
from rotexport.learning.quantizers import ActivationQuantizer, LearnedWeight, StraightThrough, WeightGrid
from rotexport.learning.training import Training
from rotexport.quant.formats import weight_format
from rotexport.quant.plan import SitePlan
from rotexport.quant.scales import QuantizedTensor
from rotexport.quant.scheme import ActivationScheme


@dataclass(frozen=True, eq=False)
class Student:
    """A float block, and the quantizers that stand in it: of weights and inputs by site, of the cache."""

    block: TorchBlock
    weights: Mapping[str, LearnedWeight]
    inputs: Mapping[str, ActivationQuantizer]
    attention: Mapping[str, Edit]

    @property
    def edits(self) -> Edits:
        """What makes the float block the quantized one."""
        return Edits(inputs=self.inputs, weights=self.weights, attention=self.attention)

    def groups(self, training: Training) -> list[dict[str, Any]]:
        """Return the parameters as an optimizer takes them, each kind with its learning rate."""
        weights = list(self.weights.values())
        scales = [p for weight in weights for p in (weight.channel, weight.factor) if p is not None]
        clips = {id(quantizer): quantizer.logit for quantizer in self.inputs.values()}
        groups = [
            (training.weight_rate, [weight.numbers for weight in weights]),
            (training.scale_rate, scales),
            (training.clip_rate, [logit for logit in clips.values() if logit is not None]),
        ]
        return [{"params": params, "lr": rate} for rate, params in groups if rate and params]

    def modules(self) -> nn.ModuleDict:
        """Return the quantizers under names that a file can keep."""
        named: dict[str, nn.Module] = {}
        for kind, quantizers in (("weight", self.weights), ("input", self.inputs)):
            named |= {f"{kind}:{site}".replace(".", "/"): module for site, module in quantizers.items()}
        return nn.ModuleDict(named)

    def project(self) -> None:
        """Bring what an optimizer moved out of the quantizers' ranges back to their ends."""
        for weight in self.weights.values():
            weight.project()

    def tensors(self) -> dict[str, QuantizedTensor]:
        """Return every weight as it is stored, by site."""
        return {site: weight.export() for site, weight in self.weights.items()}

    def planned(self, site: SitePlan) -> SitePlan:
        """Return a site's plan with the clip that was learned for its input."""
        quantizer = self.inputs.get(site.site)
        if quantizer is None:
            return site
        clip = quantizer.clip
        clip = clip if isinstance(clip, float) else clip.item()
        return replace(site, activations=replace(site.activations, clip=clip))


@dataclass(frozen=True)
class StudentSettings:
    """`scale_type` keeps the scales of weights behind float activations; clips may be learned or stay."""

    scale_type: torch.dtype
    learn_clips: bool


def make_student(
    block: TorchBlock,
    plan: Mapping[str, SitePlan],
    attention: Mapping[str, Edit],
    starts: Mapping[str, QuantizedTensor],
    settings: StudentSettings,
) -> Student:
    """Put quantizers into a block; `attention` are the cache's.

    `plan` and `starts`, the codes that weights begin with, are by site.
    """
    weights, inputs = {}, {}
    shared: dict[tuple[str, ActivationScheme, int], ActivationQuantizer] = {}
    for name, matrix in block.weights.items():
        site = plan[name]
        if site.weights.enabled:
            kept = torch.float32 if site.activations.enabled else settings.scale_type
            number_format = weight_format(site.weights.format, site.weights.symmetric)
            grid = WeightGrid(number_format, site.weight_group, kept)
            weights[name] = LearnedWeight(matrix, starts[name], grid)
        if site.activations.enabled:
            scheme, group = site.activations, site.activation_group
            key = (block.input_of[name], scheme, group)
            if key not in shared:
                shared[key] = ActivationQuantizer(scheme, group, settings.learn_clips)
            inputs[name] = shared[key]
    caches = {name: StraightThrough(quantizer) for name, quantizer in attention.items()}
    return Student(block, weights, inputs, caches)
