"""GPTQ through a block, in QuaRot's order: linears that share an input together, each with the inputs that
the weights before it, already quantized, leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rotexport.blocks.calibration import BlockTask, run_quantized
from rotexport.blocks.stream import Stream
from rotexport.blocks.torch_block import NO_EDITS, Edit, Edits
from rotexport.graph.weights import Array
from rotexport.passes.quantize_weights import quantizer_of
from rotexport.quant.formats import NumberFormat, weight_format
from rotexport.quant.gptq import damped, descend, gptq, loss
from rotexport.quant.grids import AsymmetricFactors, AsymmetricScales, FreeScales, Grid, IntegerFactors
from rotexport.quant.plan import SitePlan, WeightForm
from rotexport.quant.scales import QuantizedTensor
from rotexport.quant.scheme import GptqSettings
from rotexport.quant.solved import dequantized

JOINING = ("output", "down")  # roles of products that are added to the residual stream
SMALLEST_POWER = 1e-12  # of a token in the stream


@dataclass
class Moments:
    """Sums over tokens of x̂ᵀx̂ and x̂ᵀx [K, K]: inputs x̂ of the quantized network, x of the float one.

    `owed` [K, N] sums x̂ᵀr where the products, [..., N], are to take back an error r of what they join.
    """

    second: Array
    cross: Array
    owed: Array | None = None

    @classmethod
    def of(cls, width: int) -> Moments:
        """Return moments of nothing yet."""
        return cls(np.zeros((width, width)), np.zeros((width, width)))

    def add(
        self,
        quantized: Tensor,
        exact: Tensor | None,
        importance: Tensor | None = None,
        error: Tensor | None = None,
    ) -> None:
        """Add tokens [..., K] of both networks, each `importance` [...] times, with `error` r [..., N].

        Without importance each counts once.
        """
        rows = quantized.reshape(-1, quantized.shape[-1])
        counted = rows if importance is None else rows * importance.reshape(-1, 1)
        self.second += (counted.T @ rows).numpy()
        if exact is not None:
            self.cross += (counted.T @ exact.reshape(rows.shape)).numpy()
        if error is not None:
            owed = (counted.T @ error.reshape(len(rows), -1)).numpy()
            self.owed = owed.astype(np.float64) if self.owed is None else self.owed + owed


@dataclass(frozen=True)
class GptqMethod:
    """A `BlockMethod`: quantizes the sites whose scheme says "gptq", and rounds the others.

    With feedback, what is multiplied are the inputs as they are quantized, and the aim is the float network's
    output: the best real weight for that, W + (H + λI)⁻¹ (C - H) W with C = E[x̂ᵀx], takes W's place. H and C
    are estimates: without a ridge λ of H's own magnitude the aim follows the noise of a few windows, and is
    worse on other text than the weight. Products that join the residual stream aim at the float network's
    stream, so at taking back the error r that the quantized one carries there, too: H⁻¹E[x̂ᵀr] is added
    (LoaQ, arXiv 2509.06297). Their errors count the less, the larger the stream is at their token. Without
    feedback, activations stay float while collecting, as in QuaRot.
    """

    settings: GptqSettings

    def solve(self, task: BlockTask) -> tuple[dict[str, QuantizedTensor], dict[str, dict[str, float]]]:
        """Return codes and scales, and each site's loss as rounded, after GPTQ and after descent."""
        block, batches = task.block, task.inputs.batches()
        exact = [block.begin(task.float_inputs[windows], task.context) for windows in batches]
        inexact = [block.begin(task.inputs[windows], task.context) for windows in batches]
        original = dict(block.weights)
        solved: dict[str, QuantizedTensor] = {}
        figures: dict[str, dict[str, float]] = {}
        for group in block.groups:
            moments = self._advance(task, group, (exact, inexact), original)
            for sites in _alike([task.plan[site] for site in group]):
                weights = {site.site: original[site.site].numpy() for site in sites}
                tensors, losses = self._together(sites[0], weights, moments)
                solved |= tensors
                figures |= dict.fromkeys(weights, losses)
            for site in group:
                if site in solved:
                    block.weights[site] = torch.from_numpy(dequantized(solved[site]))
        self._finish(task.targets, task, exact, _with_weights(original))
        if self.settings.feedback:
            self._finish(task.outputs, task, inexact, task.edits)
        else:
            run_quantized(task, solved)
        return solved, figures

    def _advance(
        self,
        task: BlockTask,
        group: Sequence[str],
        streams: tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]],
        original: dict[str, Tensor],
    ) -> Moments:
        """Bring both networks up to a group's input; return its moments."""
        block, tensor = task.block, task.block.input_of[group[0]]
        settings = self.settings
        quantizer = task.edits.inputs.get(group[0]) if settings.feedback else None
        moments = Moments.of(len(original[group[0]]))
        restored = _with_weights(original)
        takes_back = settings.takes_back and len(group) == 1  # the sum's error is for one product to take
        joining = block.role_of[group[0]] in JOINING and (settings.relative or takes_back)
        for windows, exact, inexact in zip(task.inputs.batches(), *streams, strict=True):
            block.advance(exact, tensor, restored)
            block.advance(inexact, tensor, task.edits if settings.feedback else NO_EDITS)
            seen = inexact[tensor] if quantizer is None else quantizer(inexact[tensor])
            importance = error = None
            if joining:
                joined = _joined(task, group[0], windows, (exact, inexact), restored)
                importance = joined.importance if settings.relative else None
                error = joined.error if takes_back else None
            moments.add(seen, exact[tensor] if settings.feedback else None, importance, error)
        return moments

    def _together(
        self, site: SitePlan, weights: dict[str, Array], moments: Moments
    ) -> tuple[dict[str, QuantizedTensor], dict[str, float]]:
        """Quantize weights [K, N] of sites that read the same input in the same way, side by side."""
        weight = np.concatenate(list(weights.values()), axis=1)
        rounded = quantizer_of(site).quantize(weight)
        if site.weights.method != "gptq":
            return _apart(rounded, weights), {}
        hessian = damped(moments.second, self.settings.damping)
        aim = (
            best_real(weight, damped(hessian, self.settings.ridge), moments)
            if self.settings.feedback
            else weight
        )
        grid = _grid(site, aim)
        codes = gptq(aim, hessian, grid, self.settings)
        narrow = hessian.astype(np.float32)
        power = float(np.vdot(weight, narrow @ weight)) or 1.0
        losses = {"rounding": loss(aim, dequantized(rounded), narrow) / power}
        losses["gptq"] = loss(aim, codes * grid.expanded(len(codes)), narrow) / power
        if self.settings.sweeps:
            codes = descend(aim, codes, narrow, grid, self.settings)
            losses["descent"] = loss(aim, codes * grid.expanded(len(codes)), narrow) / power
        return _apart(grid.finish(codes), weights), losses

    def _finish(
        self, outputs: Stream, task: BlockTask, values: list[dict[str, Tensor]], edits: Edits
    ) -> None:
        """Bring a network to the block's end and fill its outputs."""
        for windows, reached in zip(outputs.batches(), values, strict=True):
            task.block.advance(reached, task.block.block.output, edits)
            outputs[windows] = reached.pop(task.block.block.output)


@dataclass(frozen=True)
class _Joined:
    """What a product is added to: its `error` r [windows, tokens, D], and what its tokens count.

    There is no error where something lies between the product and the sum, since r is the sum's.
    """

    importance: Tensor
    error: Tensor | None


def _joined(
    task: BlockTask, site: str, windows: slice, networks: tuple[dict[str, Tensor], ...], restored: Edits
) -> _Joined:
    """Return what a product joins, with float weights wherever none are chosen yet.

    Attention joins the stream as it entered the block. What a down projection makes is judged beside its own
    result, by the float weight, since it may be what makes a token massive.
    """
    block = task.block
    output, tensor, total = block.block.output, block.input_of[site], block.sum_of(site)
    last = block.role_of[site] == "down"
    wanted = {name for name in (output if last else None, total) if name is not None}
    exact, inexact = (block.run(values, wanted, restored) for values in networks)
    error = None
    if total is not None:
        change = (networks[0][tensor] - networks[1][tensor]) @ restored.weights[site](block.weights[site])
        error = exact[total] - inexact[total] - change
    if not last:
        return _Joined(importance_of(task.float_inputs[windows], task.inputs[windows]), error)
    networks[0][output] = exact[output]  # is what the float network leaves behind
    return _Joined(importance_of(exact[output], inexact[output]), error)


def importance_of(exact: Tensor, inexact: Tensor) -> Tensor:
    """Return what squared errors of a product that joins the stream count, by token [windows, tokens].

    It is the inverse of the stream's root mean square, halfway between absolute errors, of which a few
    massive tokens are most, and relative ones, which would forget that all others attend to those. The larger
    of both networks' counts: a token that is massive in the quantized one alone would outweigh all others.
    """
    power = torch.maximum(exact.square().mean(-1), inexact.square().mean(-1))
    return power.clamp_min(SMALLEST_POWER).rsqrt()


def best_real(weight: Array, hessian: Array, moments: Moments) -> Array:
    """Return what turns quantized inputs into x W + r best, for W [K, N]: W + H⁻¹ ((C - x̂ᵀx̂) W + x̂ᵀr).

    `hessian` H [K, K] is x̂ᵀx̂ with whatever keeps the result near W.
    """
    wanted = (moments.cross - moments.second) @ weight.astype(np.float64)
    gap = torch.from_numpy(wanted if moments.owed is None else wanted + moments.owed)
    factor = torch.linalg.cholesky(torch.from_numpy(hessian))
    result: Array = weight + torch.cholesky_solve(gap, factor).numpy().astype(np.float32)
    return result


def _with_weights(weights: dict[str, Tensor]) -> Edits:
    """Return edits that put other weights in the place of a block's own."""

    def instead(weight: Tensor) -> Edit:
        return lambda _: weight

    return Edits(weights={site: instead(weight) for site, weight in weights.items()})


def _alike(sites: Sequence[SitePlan]) -> list[list[SitePlan]]:
    """Return the sites whose weights are quantized, those with equal schemes together."""
    together: dict[object, list[SitePlan]] = {}
    for site in sites:
        if site.weights.enabled:
            together.setdefault((site.weights, site.form), []).append(site)
    return list(together.values())


def _apart(tensor: QuantizedTensor, weights: Mapping[str, Array]) -> dict[str, QuantizedTensor]:
    """Cut a quantized weight of all output channels into those of its sites."""
    ends = np.cumsum([weight.shape[1] for weight in weights.values()])
    return {
        site: tensor.columns(slice(end - weight.shape[1], end))
        for (site, weight), end in zip(weights.items(), ends, strict=True)
    }


def _grid(site: SitePlan, weight: Array) -> Grid:
    scheme = site.weights
    number_format = weight_format(scheme.format, scheme.symmetric)
    kinds: dict[tuple[bool, bool], Callable[[NumberFormat, Array, int], Grid]] = {
        (True, False): FreeScales,
        (True, True): IntegerFactors,
        (False, False): AsymmetricScales,
        (False, True): AsymmetricFactors,
    }
    kind = kinds[scheme.symmetric, site.form is WeightForm.TWO_LEVEL]
    return kind(number_format, weight, site.weight_group)
