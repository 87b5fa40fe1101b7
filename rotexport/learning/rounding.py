"""Rounding of weights that something else changes while it learns: rotations, affine transforms, clips.

Levels follow the weight at every step. Where a clip is learned, the range of a group of input channels is
multiplied by a sigmoid of its own, of which 4 is the beginning (OmniQuant's LWC, arXiv 2308.13137, section
3.2); `rotexport.quant.clipped` rounds the exported weight with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rotexport.learning.lsq import fake_quantize
from rotexport.quant.formats import weight_format
from rotexport.quant.plan import SitePlan

FIRST_LOGIT = 4.0  # of a clip: sigmoid(4) = 0.982


class WeightRounding(nn.Module):  # type: ignore[misc]  # torch is Any here
    """Rounds a weight [K, N] to the nearest levels of its range; a learned clip has a gradient."""

    def __init__(self, site: SitePlan, outputs: int, learn_clip: bool) -> None:
        """Follow a site's scheme; `outputs` is N."""
        super().__init__()
        scheme = site.weights
        self.format = weight_format(scheme.format, scheme.symmetric)
        self.group = site.weight_group
        self._symmetric = scheme.symmetric
        shape = (site.inputs // self.group, 1, outputs)
        self.logit = nn.Parameter(torch.full(shape, FIRST_LOGIT)) if learn_clip else None

    def ratios(self) -> Tensor | None:
        """Return by what ranges are multiplied, [K / group, N]; None where no clip is learned."""
        return None if self.logit is None else self.logit.detach().sigmoid()[:, 0]

    def forward(self, weight: Tensor) -> Tensor:
        """Return what a weight stands for after rounding."""
        groups = weight.unflatten(0, (-1, self.group))
        scale, bounds = self._levels(groups.detach())
        return fake_quantize(groups, scale, *bounds).flatten(0, 1)

    def _levels(self, groups: Tensor) -> tuple[Tensor, tuple[Any, Any]]:
        """Return scales [G, 1, N], and the bounds of codes counted from the zero point."""
        smallest, number_format = torch.finfo(torch.float32).tiny, self.format
        if self._symmetric:
            scale = groups.abs().amax(1, keepdim=True) / number_format.highest
            return self._clipped(scale).clamp_min(smallest), (number_format.lowest, number_format.highest)
        least, most = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True).clamp_min(0)
        scale = ((most - least) / (number_format.highest - number_format.lowest)).clamp_min(smallest)
        # Clipped at both ends alike, a range keeps its zero point.
        zero = (number_format.lowest - least / scale).round()
        zero = zero.clamp(number_format.lowest, number_format.highest)
        return self._clipped(scale), (number_format.lowest - zero, number_format.highest - zero)

    def _clipped(self, scale: Tensor) -> Tensor:
        return scale if self.logit is None else scale * self.logit.sigmoid()
