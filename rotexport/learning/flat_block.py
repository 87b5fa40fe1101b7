"""The transforms and clips that FlatQuant learns for one block, and where they enter it.

    linears that share an input     x → (x ⊙ c)(A ⊗ B), weights take the inverse
    values                          v → v P within every head, folded: W_v → W_v P, W_o → P⁻¹ W_o
    the output projection's input   heads are mixed, z → z (Q ⊗ I); W_o takes the inverse
    keys and queries                k → k R, q → q R⁻ᵀ, behind rotary embedding, where the cache is quantized

as in FlatQuant's figure 4 (arXiv 2410.09426). Where values cannot take a transform of their own (something
pins their basis, or another block reads them) the output projection's input is treated as all others are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from rotexport.blocks.torch_block import Edit, Edits, TorchBlock
from rotexport.graph.basis import Bases
from rotexport.learning.affine import Factor, KroneckerAffine, kronecker
from rotexport.learning.rotations import rotate
from rotexport.learning.rounding import WeightRounding
from rotexport.quant.plan import SitePlan
from rotexport.transforms.transform import (
    Identity,
    InvertibleMatrix,
    KroneckerPair,
    ScaledKronecker,
    Transform,
)

Group = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ValuePath:
    """Where the values of a block run: their head size, axes of constants that take their basis, reader.

    `uses` holds, by constant, (axis, whether it consumes); `output` is the site that reads the heads side by
    side, if all of it is theirs, and `heads` how many those are.
    """

    size: int
    heads: int
    output: str | None
    uses: Mapping[str, list[tuple[int, bool]]]


def value_path(block: TorchBlock, bases: Bases) -> ValuePath | None:
    """Return the path of a block's values; None where they cannot take a transform of their own."""
    attentions = [node for node in block.block.nodes if node.op == "Attention"]
    component = bases.at(attentions[0].inputs[2]) if len(attentions) == 1 else None
    if component is None or not component.free or component.orthogonal_only or component.residual_sums:
        return None
    inside = {id(node) for node in block.block.nodes}
    if not component.absorbers or not all(id(absorber.node) in inside for absorber in component.absorbers):
        return None
    uses: dict[str, list[tuple[int, bool]]] = {}
    for absorber in component.absorbers:
        name = str(absorber.node.inputs[absorber.input_index].name)
        uses.setdefault(name, []).append((absorber.axis, absorber.consumes))
    readers = [site for site in block.block.sites if bases.at(site.input) is component]
    heads = int(readers[0].weight.shape[0]) // component.size if len(readers) == 1 else 0
    return ValuePath(component.size, heads, readers[0].name if heads else None, uses)


@dataclass(frozen=True)
class Flattening:
    """What was learned: transforms of inputs by the sites that share them, of values and keys by block.

    `clips` of dynamic activations are by site.
    """

    inputs: dict[Group, Transform] = field(default_factory=dict)
    values: dict[int, Transform] = field(default_factory=dict)
    keys: dict[int, Transform] = field(default_factory=dict)
    clips: dict[str, float] = field(default_factory=dict)

    def __or__(self, other: Flattening) -> Flattening:
        """Return both together."""
        return Flattening(
            self.inputs | other.inputs,
            self.values | other.values,
            self.keys | other.keys,
            self.clips | other.clips,
        )

    def clipped(self, site: SitePlan) -> SitePlan:
        """Return a site's plan with the clip that was learned for its activations."""
        if site.site not in self.clips or site.activations.mode != "dynamic":
            return site
        return replace(site, activations=replace(site.activations, clip=self.clips[site.site]))


@dataclass(frozen=True, eq=False)
class Quantizers:
    """What a block's quantized graph has, to stand behind transforms: by site, and for the cache."""

    inputs: Mapping[str, Any]
    weights: Mapping[str, WeightRounding]
    attention: Mapping[str, Edit]


class FlatBlock(nn.Module):  # type: ignore[misc]  # torch is Any here
    """Everything learned for one block."""

    def __init__(
        self,
        block: TorchBlock,
        path: ValuePath | None,
        scales: Mapping[Group, Tensor],
        quantizers: Quantizers,
        seed: int,
    ) -> None:
        """Take the first scales c of every group of sites that shares a quantized input."""
        super().__init__()
        self.block, self.path, self.quantizers = block, path, quantizers
        cached = "value" in quantizers.attention
        self.mixed = next((group for group in scales if path is not None and group == (path.output,)), None)
        self.affine = {
            group: KroneckerAffine(scale, seed) for group, scale in scales.items() if group != self.mixed
        }
        self.values = Factor(path.size, seed + 2) if path and (self.mixed or cached) else None
        self.heads = Factor(path.heads, seed + 3) if path and self.mixed else None
        sizes = [int(n.inputs[1].shape[-1]) for n in block.block.nodes if n.op == "Attention"]
        self.keys = Factor(sizes[0], seed + 4) if "key" in quantizers.attention and len(sizes) == 1 else None
        self._learned = nn.ModuleList(self.affine.values())
        clips = [*quantizers.weights.values(), *dict.fromkeys(quantizers.inputs.values())]
        self._clips = nn.ModuleList(clips)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to learn."""
        return not list(self.parameters())

    def transform_parameters(self) -> list[nn.Parameter]:
        """Return what transforms are made of."""
        clips = {id(parameter) for parameter in self.clip_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in clips]

    def clip_parameters(self) -> list[nn.Parameter]:
        """Return what clips are made of; none where they are not learned."""
        return list(self._clips.parameters())

    def forward(self, x: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """Return the output of the transformed and quantized block."""
        given = {**self.block.begin(x, context), **self._biases()}
        name = self.block.block.output
        output: Tensor = self.block.run(given, [name], self.edits())[name]
        return output

    def edits(self) -> Edits:
        """Return what puts the transforms, and the quantizers behind them, into the block."""
        inputs: dict[str, Edit] = dict(self.quantizers.inputs)
        for group, affine in self.affine.items():
            shared: dict[int, Edit] = {}
            for site in group:
                quantizer = self.quantizers.inputs[site]
                inputs[site] = shared.setdefault(id(quantizer), _then(affine, quantizer))
        if self.mixed is not None:
            inputs[self.mixed[0]] = _then(self._mix, self.quantizers.inputs[self.mixed[0]])
        weights = {site.name: self._weight(site.name, site.weight.name) for site in self.block.block.sites}
        return Edits(inputs, weights, self._attention())

    def _weight(self, site: str, constant: str) -> Edit:
        affine = next((module for group, module in self.affine.items() if site in group), None)
        rounding = self.quantizers.weights.get(site)

        def edit(weight: Tensor) -> Tensor:
            weight = self._in_value_basis(constant, weight)
            if affine is not None:
                weight = affine.into_weight(weight)
            if self.mixed == (site,) and self.heads is not None:
                weight = kronecker(weight.mT, self.heads.contragredient(), None).mT
            return weight if rounding is None else rounding(weight)

        return edit

    def _mix(self, x: Tensor) -> Tensor:
        return x if self.heads is None else kronecker(x, self.heads.matrix(), None)

    def _in_value_basis(self, constant: str, values: Tensor) -> Tensor:
        if self.values is None or self.path is None:
            return values
        for axis, consumes in self.path.uses.get(constant, ()):
            matrix = self.values.contragredient() if consumes else self.values.matrix()
            values = rotate(values, axis, matrix)
        return values

    def _biases(self) -> dict[str, Tensor]:
        """Return the block's constants other than weights of sites, in the basis of the values."""
        if self.values is None or self.path is None:
            return {}
        sites = {site.weight.name for site in self.block.block.sites}
        return {
            name: self._in_value_basis(name, self.block.constants[name])
            for name in self.path.uses
            if name not in sites
        }

    def _attention(self) -> dict[str, Edit]:
        edits = dict(self.quantizers.attention)
        if self.keys is not None:
            keys, cache = self.keys, edits["key"]
            edits["key"] = lambda k: cache(k @ keys.matrix())
            edits["query"] = lambda q: q @ keys.contragredient()
        return edits

    def export(self) -> Flattening:
        """Return what was learned, in float64."""
        index = self.block.block.index
        inputs: dict[Group, Transform] = {group: module.transform() for group, module in self.affine.items()}
        if self.mixed is not None and self.heads is not None and self.path is not None:
            inputs[self.mixed] = KroneckerPair(_matrix(self.heads), Identity(self.path.size))
        keys = None if self.keys is None else KroneckerPair(Identity(1), _matrix(self.keys))
        return Flattening(
            inputs,
            {} if self.values is None else {index: _matrix(self.values)},
            {} if keys is None else {index: ScaledKronecker(None, keys)},
            {
                site: float(quantizer.clip.detach())
                for site, quantizer in self.quantizers.inputs.items()
                if quantizer.logit is not None
            },
        )


def _matrix(factor: Factor) -> InvertibleMatrix:
    return InvertibleMatrix(factor.exact())


def _then(first: Edit, second: Edit) -> Edit:
    return lambda x: second(first(x))
