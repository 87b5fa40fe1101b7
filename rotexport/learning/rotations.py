"""Learning R1 and R2: rotations that leave the float network as it is and make the quantized one better.

SpinQuant (arXiv 2405.16406, section 3): weights stay, R1 (of the residual stream) and one R2 a block (of the
values within each head) descend on the orthogonal matrices by Cayley SGD. Both fold into weights, so weights
are rotated anew at every step, W ← R_inᵀ W R_out, and the stream enters as x R1.

What is learned here comes on top of the rotations that the graph already has (SpinQuant starts at a random
Hadamard), so it begins at the identity; `fold` composes the two. Weights that GPTQ will choose stay float
while rotations are learned, others are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rotexport.blocks.calibration import Network
from rotexport.blocks.split import BlockGraph
from rotexport.blocks.torch_block import Edit, Edits, TorchBlock
from rotexport.graph.basis import Absorber, Bases, Component, analyse, residual
from rotexport.learning.quantizers import ActivationQuantizer, StraightThrough
from rotexport.learning.rounding import WeightRounding


@dataclass(frozen=True, eq=False)
class Use:
    """One axis of one constant that takes a rotation up; `consumes` as in `Absorber`."""

    rotation: nn.Parameter
    axis: int
    consumes: bool

    def __call__(self, values: Tensor) -> Tensor:
        """Return a constant in the rotated basis: v → v R for every block of its vectors along the axis."""
        return rotate(values, self.axis, self.rotation)


def rotate(values: Tensor, axis: int, rotation: Tensor) -> Tensor:
    """Return `values` with each stretch of R's size along `axis` multiplied by R, as a row vector."""
    moved = values.movedim(axis, -1)
    blocks = moved.unflatten(-1, (-1, rotation.shape[0])) @ rotation
    return blocks.flatten(-2).movedim(-1, axis)


class Rotations(nn.Module):  # type: ignore[misc]  # torch is Any here
    """R1 [width, width] and R2 [head, head] by block, each the identity at first; None where not learned."""

    def __init__(self, network: Network, learn_r1: bool, learn_r2: bool) -> None:
        super().__init__()
        self._uses: dict[str, list[Use]] = {}
        bases = analyse(network.graph)
        stream = residual(bases) if learn_r1 else None
        self.r1 = self._add(stream)
        self.r2 = nn.ParameterDict()
        for component, block in _values(network, bases) if learn_r2 else ():
            rotation = self._add(component)
            if rotation is not None:
                self.r2[str(block)] = rotation

    def _add(self, component: Component | None) -> nn.Parameter | None:
        if component is None or not component.free:
            return None
        rotation = nn.Parameter(torch.eye(component.size))
        for absorber in component.absorbers:
            use = Use(rotation, absorber.axis, absorber.consumes)
            self._uses.setdefault(_constant_name(absorber), []).append(use)
        return rotation

    def into(self, x: Tensor) -> Tensor:
        """Return a stream x as x R1."""
        return x if self.r1 is None else x @ self.r1

    def out_of(self, x: Tensor) -> Tensor:
        """Return a rotated stream in the basis of the graph."""
        return x if self.r1 is None else x @ self.r1.mT

    def constants(self, block: TorchBlock) -> dict[str, Tensor]:
        """Return the block's constants other than weights of sites, rotated: biases."""
        sites = {site.weight.name for site in block.block.sites}
        return {
            name: self._rotated(name, value)
            for name, value in block.constants.items()
            if name in self._uses and name not in sites
        }

    def weight_edits(self, block: BlockGraph, quantizers: Mapping[str, Edit]) -> dict[str, Edit]:
        """Return what rotates, then quantizes, the weight of every site."""

        def edit(name: str, quantizer: Edit) -> Edit:
            return lambda weight: quantizer(self._rotated(name, weight))

        return {
            site.name: edit(site.weight.name, quantizers.get(site.name, _unchanged)) for site in block.sites
        }

    def _rotated(self, name: str, values: Tensor) -> Tensor:
        for use in self._uses.get(name, ()):
            values = use(values)
        return values


def quantizers(
    network: Network, block: BlockGraph, learn_clips: bool = False
) -> tuple[dict[str, WeightRounding], Edits]:
    """Return differentiable quantizers of a block: of weights by site, and of inputs and cache."""
    plan = {site.site: site for site in network.plan}
    inputs: dict[str, Edit] = {}
    shared: dict[object, Edit] = {}
    weights: dict[str, WeightRounding] = {}
    for site in block.sites:
        planned = plan[site.name]
        scheme = planned.activations
        if scheme.enabled:
            key = (site.input.name, scheme, planned.activation_group)
            if key not in shared:
                shared[key] = ActivationQuantizer(scheme, planned.activation_group, learn_clips)
            inputs[site.name] = shared[key]
        if planned.weights.enabled and planned.weights.method != "gptq":
            weights[site.name] = WeightRounding(planned, int(site.weight.shape[1]), learn_clips)
    caches = {name: StraightThrough(edit) for name, edit in network.edits(block).attention.items()}
    return weights, Edits(inputs, {}, caches)


def _values(network: Network, bases: Bases) -> Sequence[tuple[Component, int]]:
    """Return the components of the values, each with the first block that has it."""
    found: dict[int, tuple[Component, int]] = {}
    attentions = [node for node in network.graph.nodes if node.op == "Attention"]
    for block, node in enumerate(attentions):
        component = bases.at(node.inputs[2])
        if component is not None:
            found.setdefault(id(component), (component, block))
    return list(found.values())


def _constant_name(absorber: Absorber) -> str:
    return str(absorber.node.inputs[absorber.input_index].name)


def _unchanged(weight: Tensor) -> Tensor:
    return weight
