"""A block with learned quantizers on everything its plan quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rotexport.blocks.torch_block import Edit, Edits, TorchBlock
from rotexport.errors import RecipeError
from rotexport.learning.quantizers import ActivationQuantizer, LearnedWeight, StraightThrough, WeightGrid
from rotexport.quant.formats import weight_format
from rotexport.quant.plan import SitePlan
from rotexport.quant.scales import QuantizedTensor
from rotexport.quant.scheme import ActivationScheme


@dataclass(frozen=True)
class Rates:
    """Learning rates: of weights, in steps of their grid; of the logarithms of scales, and of clips."""

    weights: float = 0.01
    scales: float = 0.002
    clips: float = 0.02


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

    def groups(self, rates: Rates) -> list[dict[str, Any]]:
        """Return the parameters as an optimizer takes them, each kind with its learning rate."""
        weights = list(self.weights.values())
        scales = [p for weight in weights for p in (weight.channel, weight.factor) if p is not None]
        clips = {id(quantizer): quantizer.logit for quantizer in self.inputs.values()}
        groups = [
            (rates.weights, [weight.numbers for weight in weights]),
            (rates.scales, scales),
            (rates.clips, list(clips.values())),
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
        clip = float(quantizer.clip.detach())
        return replace(site, activations=replace(site.activations, clip=clip))


def make_student(
    block: TorchBlock,
    plan: Mapping[str, SitePlan],
    starts: Mapping[str, QuantizedTensor],
    attention: Mapping[str, Edit],
    scale_type: torch.dtype,
) -> Student:
    """Put quantizers into a block, starting from the codes of `starts`; `plan` and `starts` are by site.

    `attention` are the quantizers of the cache; `scale_type` keeps the scales of weights whose activations
    stay in floating point.

    Raises:
        RecipeError: a site has static activations, or a format that is not an integer's.

    """
    weights, inputs = {}, {}
    shared: dict[tuple[str, ActivationScheme, int], ActivationQuantizer] = {}
    for name, matrix in block.weights.items():
        site = plan[name]
        _check(site)
        if site.weights.enabled:
            kept = torch.float32 if site.activations.enabled else scale_type
            grid = WeightGrid(weight_format(site.weights.format), site.weight_group, kept)
            weights[name] = LearnedWeight(matrix, starts[name], grid)
        if site.activations.enabled:
            key = (block.input_of[name], site.activations, site.activation_group)
            if key not in shared:
                shared[key] = ActivationQuantizer(site.activations, site.activation_group)
            inputs[name] = shared[key]
    caches = {name: StraightThrough(quantizer) for name, quantizer in attention.items()}
    return Student(block, weights, inputs, caches)


def _check(site: SitePlan) -> None:
    formats = {site.weights.format, site.activations.format} - {"none"}
    if not formats <= {"int8", "int4"}:
        named = ", ".join(sorted(formats - {"int8", "int4"}))
        raise RecipeError(f"site {site.site}: weights are learned in int8 and int4, not in {named}")
    if site.activations.enabled and site.activations.mode == "static":
        raise RecipeError(
            f"site {site.site}: weights are learned behind dynamic activations only; "
            "set activations.mode: dynamic, or weights.method to another than qat"
        )
