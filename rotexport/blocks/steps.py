"""What each step of a build does to each block: the error of its output when the block alone is quantized.

Every block reads the float network's stream, so a step is judged where it acts. While weights are not chosen
they are rounded to nearest, without a search, and static scales that are not calibrated yet count as dynamic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from rotexport.blocks.calibration import Network, quantized_weights
from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import TorchBlock
from rotexport.graph.weights import Array
from rotexport.quant.plan import SitePlan
from rotexport.quant.scales import WeightQuantizer

WINDOWS: Final = 2  # of the calibration text: steps differ by more than text does


@dataclass(frozen=True)
class StepErrors:
    """By block, the mean over tokens of |error|² / |output|² after a step."""

    step: str
    blocks: tuple[float, ...]


def step_errors(
    step: str,
    network: Network,
    solved: Mapping[str, WeightQuantizer],
    windows: Array,
    advance: Callable[[int, int], None],
) -> StepErrors:
    """Quantize each block of a network alone, with the `solved` weights where there are any, by site.

    `windows` are calibration token ids [W, S], of which the first are used.
    """
    network = replace(network, plan=[_measurable(site, network) for site in network.plan])
    split = split_blocks(network.graph)
    context, errors = split.context(windows.shape[1]), []
    with torch.no_grad():
        x = torch.cat([split.embed(window) for window in windows[:WINDOWS]])
        for number, graph in enumerate(split.blocks):
            block, edits = TorchBlock(graph), network.edits(graph)
            output = block(x, context)
            block.weights |= quantized_weights(network, solved, block)
            quantized = block(x, context, edits)
            power = output.square().sum(-1).clamp_min(torch.finfo(output.dtype).tiny)
            errors.append(float(((quantized - output).square().sum(-1) / power).mean()))
            x = output
            advance(number + 1, len(split.blocks))
    return StepErrors(step, tuple(errors))


def _measurable(site: SitePlan, network: Network) -> SitePlan:
    weights, activations = replace(site.weights, method="rtn"), site.activations
    if activations.mode == "static" and site.site not in network.statistics:
        activations = replace(activations, mode="dynamic")
    return replace(site, weights=weights, activations=activations)
