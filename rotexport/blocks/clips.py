"""Searching how far activations are clipped: per input, for the least error of the products that read it.

Before weights are chosen, on the float network: |Q(x) W - x W|² tells what a clip costs. Behind them, on the
network with its quantized weights up to there: |Q(x̂) Ŵ - x W|², which also sees what came before. An error
counts relative to the power of the token's own product. The clip in force is always among those tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rotexport.blocks.calibration import Network
from rotexport.blocks.split import BlockGraph, split_blocks
from rotexport.blocks.torch_block import NO_EDITS, Edit, Edits, TorchBlock
from rotexport.graph.weights import Array
from rotexport.quant.plan import SitePlan
from rotexport.quant.scales import WeightQuantizer
from rotexport.quant.solved import dequantized


@dataclass(frozen=True)
class ClipChoice:
    """The clip of one input, and the relative squared error of its products: as it was, and with the clip."""

    sites: tuple[str, ...]
    clip: float
    before: float
    after: float


def search_clips(
    network: Network,
    solved: Mapping[str, WeightQuantizer],
    windows: Array,
    advance: Callable[[int, int], None],
) -> tuple[list[SitePlan], list[ClipChoice]]:
    """Return the plan with the best clip of every quantized input inside blocks, and what each gained.

    Args:
        network: what is quantized; its graph is not changed.
        solved: the quantized weights by site; empty while none are chosen.
        windows: calibration token ids [W, S], of which the first are used.
        advance: told (blocks done, blocks in all).
    """
    split = split_blocks(network.graph)
    search = network.recipe.clip_search
    chosen: list[ClipChoice] = []
    with torch.no_grad():
        x = torch.cat([split.embed(window) for window in windows[: search.windows]])
        context, reached = split.context(windows.shape[1]), (x, x)
        for number, graph in enumerate(split.blocks):
            visit = _Visit(network, graph, solved, context)
            found, reached = visit.search(*reached)
            chosen += found
            advance(number + 1, len(split.blocks))
    clips = {site: choice.clip for choice in chosen for site in choice.sites}
    return [_clipped(site, clips.get(site.site)) for site in network.plan], chosen


class _Visit:
    """One block, its float and its quantized weights, and the quantizers chosen so far."""

    def __init__(
        self,
        network: Network,
        graph: BlockGraph,
        solved: Mapping[str, WeightQuantizer],
        context: Mapping[str, Tensor],
    ) -> None:
        self.network, self.block, self.context = network, TorchBlock(graph), context
        self.plan = {site.site: site for site in network.plan}
        self.weights = {
            site: torch.from_numpy(dequantized(solved[site].quantize(weight.numpy())))
            for site, weight in self.block.weights.items()
            if site in solved
        }
        edits = network.edits(graph)
        # While no weight is chosen the float network itself is what flows.
        self.inputs: dict[str, Edit] = dict(edits.inputs) if solved else {}
        self.attention = edits.attention if solved else {}

    def search(self, exact: Tensor, inexact: Tensor) -> tuple[list[ClipChoice], tuple[Tensor, Tensor]]:
        """Return the choices of a block, and what leaves it in the float and in the quantized network."""
        output = self.block.block.output
        streams = [self.block.begin(x, self.context) for x in (exact, inexact)]
        choices = []
        for group in self.block.groups:
            seen = self._advance(streams, self.block.input_of[group[0]])
            for sites in _alike([self.plan[site] for site in group]):
                choices.append(self._choose(sites, *seen))
        exact, inexact = self._advance(streams, output)
        return choices, (exact, inexact)

    def _advance(self, streams: Sequence[dict[str, Tensor]], tensor: str) -> tuple[Tensor, Tensor]:
        for values, edits in zip(streams, (NO_EDITS, self._edits()), strict=True):
            self.block.advance(values, tensor, edits)
        return streams[0][tensor], streams[1][tensor]

    def _edits(self) -> Edits:
        weights = {site: _instead(weight) for site, weight in self.weights.items()}
        return Edits(self.inputs, weights, self.attention)

    def _choose(self, sites: Sequence[SitePlan], exact: Tensor, inexact: Tensor) -> ClipChoice:
        """Try clips on an input of sites that are quantized alike; keep the best for what follows."""
        names = [site.site for site in sites]
        weight = torch.cat([self.block.weights[name] for name in names], 1)
        rounded = torch.cat([self.weights.get(name, self.block.weights[name]) for name in names], 1)
        target = exact @ weight
        power = target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)

        def error(clip: float) -> float:
            quantizer = self._quantizer(_clipped(sites[0], clip))
            wrong = (quantizer(inexact) @ rounded - target).square().sum(-1)
            return float((wrong / power).mean())

        search, before = self.network.recipe.clip_search, sites[0].activations.clip
        errors = {
            float(clip): error(float(clip)) for clip in np.linspace(1, search.lowest, search.candidates)
        }
        errors.setdefault(before, error(before))
        best = min(errors, key=lambda clip: (errors[clip], clip != before))
        if self.inputs:
            self.inputs |= dict.fromkeys(names, self._quantizer(_clipped(sites[0], best)))
        return ClipChoice(tuple(names), best, errors[before], errors[best])

    def _quantizer(self, site: SitePlan) -> Edit:
        quantizer = self.network.activation_quantizer(site)
        assert quantizer is not None  # only sites with quantized activations come here
        return quantizer


def _clipped(site: SitePlan, clip: float | None) -> SitePlan:
    return site if clip is None else replace(site, activations=replace(site.activations, clip=clip))


def _alike(sites: Sequence[SitePlan]) -> list[list[SitePlan]]:
    """Return the sites whose activations are quantized, those with equal schemes together."""
    together: dict[object, list[SitePlan]] = {}
    for site in sites:
        if site.activations.enabled:
            together.setdefault((site.activations, site.activation_group), []).append(site)
    return list(together.values())


def _instead(weight: Tensor) -> Edit:
    return lambda _: weight
