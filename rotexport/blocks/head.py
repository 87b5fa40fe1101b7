"""What the output head can take up of the error that quantized blocks leave in its inputs.

With inputs x̂ of the quantized network and x of the float one, H = E[x̂ᵀx̂] and C = E[x̂ᵀx], the products
x̂ M W are nearest the float network's x W, in least squares, for M = I + (H + λI)⁻¹ (C - H), whatever W is. M
folds into W, so it costs nothing where the head has a weight of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from rotexport.blocks.calibration import Network, quantized_weights
from rotexport.blocks.gptq_blocks import Moments, best_real
from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import TorchBlock
from rotexport.graph.weights import Array
from rotexport.quant.gptq import damped
from rotexport.quant.scales import WeightQuantizer


@dataclass(frozen=True, eq=False)
class CorrectedHead:
    """M [K, K], and the relative squared error of the head's inputs with the quantized network before it."""

    matrix: Array
    before: float
    after: float

    @property
    def note(self) -> str:
        """What a reader of the report should know."""
        return (
            f"head corrected: relative squared error of what it reads {self.before:.4g} to {self.after:.4g}"
        )


def head_correction(
    network: Network,
    solved: Mapping[str, WeightQuantizer],
    windows: Array,
    ridge: float,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> CorrectedHead:
    """Return M for the head of a network whose weights are `solved`, by site, or rounded.

    Args:
        network: what is quantized, and how; its graph is not changed.
        solved: quantizers of weights by site.
        windows: calibration token ids [W, S]; both networks' streams over all of them are in memory.
        ridge: λ, in units of H's mean diagonal.
        advance: told (blocks done, blocks in all).

    """
    split = split_blocks(network.graph)
    context = split.context(windows.shape[1])
    exact = [split.embed(window) for window in windows]
    inexact = list(exact)
    with torch.no_grad():
        for number, graph in enumerate(split.blocks):
            block, edits = TorchBlock(graph), network.edits(graph)
            exact = [block(x, context) for x in exact]
            block.weights |= quantized_weights(network, solved, block)
            inexact = [block(x, context, edits) for x in inexact]
            advance(number + 1, len(split.blocks))
        seen = [(split.head_inputs(y), split.head_inputs(x)) for y, x in zip(inexact, exact, strict=True)]
    width = seen[0][0].shape[-1]
    moments = Moments.of(width)
    for quantized, wanted in seen:
        moments.add(quantized, wanted)
    matrix = best_real(np.eye(width, dtype=np.float32), damped(moments.second, ridge), moments)
    mapped = torch.from_numpy(matrix)
    power = sum(float(x.square().sum()) for _, x in seen)
    before = sum(float((y - x).square().sum()) for y, x in seen) / power
    after = sum(float((y @ mapped - x).square().sum()) for y, x in seen) / power
    return CorrectedHead(matrix, before, after)
