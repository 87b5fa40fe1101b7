"""What each linear alone costs when it is quantized, and which ones to keep wider under a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from rotexport.blocks.calibration import Network
from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import Edits, TorchBlock
from rotexport.graph.weights import Array
from rotexport.passes.quantize_weights import quantizer_of
from rotexport.quant.plan import SitePlan
from rotexport.quant.scheme import MixedScheme, WeightScheme
from rotexport.quant.solved import dequantized

WINDOWS: Final = 2  # of the calibration text: sites differ by orders of magnitude
BITS: Final = {"int8": 8, "int4": 4, "fp8": 8}
SCALE_BITS: Final = 32


@dataclass(frozen=True)
class Sensitivity:
    """Mean over tokens of the squared error that one site, quantized alone, leaves in its block's output,
    relative to the token's power there: as the recipe has it, and with its weight kept wider."""

    site: str
    narrow: float
    wide: float
    extra_bytes: int

    @property
    def gain(self) -> float:
        """Error saved per byte spent on the wider weight."""
        return (self.narrow - self.wide) / self.extra_bytes


def sensitivities(
    network: Network, windows: Array, wider: MixedScheme, advance: Callable[[int, int], None]
) -> list[Sensitivity]:
    """Quantize one site after another, alone, behind the float network; return what each costs.

    Weights are rounded to nearest, whatever method the recipe will use: that shows where it is hard.
    """
    split = split_blocks(network.graph)
    plan = {site.site: site for site in network.plan}
    context = split.context(windows.shape[1])
    found = []
    with torch.no_grad():
        x = torch.cat([split.embed(window) for window in windows[:WINDOWS]])
        for number, part in enumerate(split.blocks):
            block = TorchBlock(part)
            output = block(x, context)
            probe = _Probe(block, x, output, context)
            for site in part.sites:
                if plan[site.name].weights.enabled:
                    found.append(_site(plan[site.name], network.edits(part), probe, wider))
            x = output
            advance(number + 1, len(split.blocks))
    return found


@dataclass(frozen=True, eq=False)
class _Probe:
    block: TorchBlock
    inputs: Tensor
    output: Tensor
    context: Mapping[str, Tensor]

    def error(self, site: SitePlan, edits: Edits) -> float:
        """Return the mean relative squared error of the block's output with one site quantized."""
        weight = self.block.weights[site.site]
        rounded = torch.from_numpy(dequantized(quantizer_of(site).quantize(weight.numpy())))
        inputs = {name: edit for name, edit in edits.inputs.items() if name == site.site}
        alone = Edits(inputs, {site.site: lambda _: rounded})
        error = self.block(self.inputs, self.context, alone) - self.output
        power = self.output.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return float((error.square().sum(-1) / power).mean())


def _site(site: SitePlan, edits: Edits, probe: _Probe, wider: MixedScheme) -> Sensitivity:
    wide = widened(site, wider)
    outputs = probe.block.weights[site.site].shape[1]
    extra = weight_bytes(wide, outputs) - weight_bytes(site, outputs)
    return Sensitivity(site.site, probe.error(site, edits), probe.error(wide, edits), max(1, extra))


def widened(site: SitePlan, wider: MixedScheme) -> SitePlan:
    """Return a site with the wider weight, scaled per output channel."""
    scheme: WeightScheme = replace(site.weights, format=wider.format, group=None)
    return replace(site, weights=scheme, clips=None)


def weight_bytes(site: SitePlan, outputs: int) -> int:
    """Return what a site's codes, scales and zero points take."""
    groups = site.inputs // site.weight_group
    width = BITS[site.weights.format]
    bits = site.inputs * width + groups * (SCALE_BITS + (0 if site.weights.symmetric else width))
    return outputs * bits // 8


def widen(
    plan: Sequence[SitePlan], found: Sequence[Sensitivity], outputs: Mapping[str, int], wider: MixedScheme
) -> tuple[list[SitePlan], list[str]]:
    """Keep sites wider, those that gain most per byte first, while the budget lasts; say which."""
    enabled = [site for site in plan if site.weights.enabled and site.site in outputs]
    room = (wider.budget - 1) * sum(weight_bytes(site, outputs[site.site]) for site in enabled)
    chosen = []
    for candidate in sorted(found, key=lambda s: s.gain, reverse=True):
        if candidate.gain > 0 and candidate.extra_bytes <= room:
            room -= candidate.extra_bytes
            chosen.append(candidate.site)
    changed = [widened(site, wider) if site.site in chosen else site for site in plan]
    notes = [f"{', '.join(chosen)}: weights kept {wider.format}"] if chosen else []
    return changed, notes
