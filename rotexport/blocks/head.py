"""What the output head can take up of the error that quantized blocks leave in its inputs.

With inputs x̂ of the quantized network and x of the float one, H = E[x̂ᵀx̂] and C = E[x̂ᵀx], the products
x̂ M W are nearest the float network's x W, in least squares, for M = I + (H + λI)⁻¹ (C - H), whatever W is. M
folds into W, so it costs nothing where the head has a weight of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rotexport.blocks.calibration import Behind
from rotexport.blocks.gptq_blocks import Moments, best_real
from rotexport.blocks.split import Split
from rotexport.graph.weights import Array
from rotexport.quant.gptq import damped


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


def head_correction(split: Split, behind: Behind, ridge: float) -> CorrectedHead:
    """Return M for the head of a network whose blocks leave these streams.

    Args:
        split: the network's graph; it is not changed.
        behind: both networks' streams behind the last block, in batches.
        ridge: λ, in units of H's mean diagonal.

    """
    with torch.no_grad():
        seen = [
            (split.head_inputs(y), split.head_inputs(x))
            for y, x in zip(behind.quantized, behind.exact, strict=True)
        ]
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
