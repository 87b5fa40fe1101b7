"""R1 and R2 in closed form: along what linears read strongly and weigh weakly, each direction balanced.

Rounding x T or T⁻¹ W, behind a Hadamard, which spreads errors evenly, costs a product x W in proportion to

    E|x T|² · |T⁻¹ W|² = tr(Tᵀ S T) · tr(T⁻¹ M T⁻ᵀ),    S = E[xᵀx],  M = W Wᵀ,

whichever of the two is rounded. With T = R diag(c) and R orthogonal that is least at c⁴ = m / s, where s and
m are the diagonals of RᵀSR and RᵀMR: it is (Σ √(s m))² then, by Cauchy and Schwarz at most what it is
without c, and the less the more s and m differ. One R1 serves all linears; the eigenvectors of the mean of
S / tr S - M / tr M tell strong inputs from strong weights. A norm lets no scale pass, so c and the Hadamard
run online behind it. Values pass through attention by any invertible map, so that R2 takes the least of
all, T Tᵀ = S^-½ (S^½ M S^½)^½ S^-½, the geometric mean of S⁻¹ and M, before a Hadamard; it folds entirely.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from rotexport.blocks.calibration import Network
from rotexport.blocks.split import Split, split_blocks
from rotexport.blocks.torch_block import TorchBlock
from rotexport.graph.basis import Bases, Component, analyse, attention_nodes, residual
from rotexport.graph.weights import Array
from rotexport.passes.rotate_residual import obstacle
from rotexport.transforms.transform import (
    Composition,
    Diagonal,
    Hadamard,
    InvertibleMatrix,
    OrthogonalMatrix,
    Transform,
)

WINDOWS: Final = 4  # of the calibration text: their tokens are several times as many as a matrix is wide
SMALLEST: Final = 1e-7  # of a mean power: directions weaker than that are noise
STRONGEST: Final = 32.0  # a direction is scaled by at most this, relative to the middle one


@dataclass(frozen=True, eq=False)
class Principal:
    """R1 under None and R2 by block, and what goes online in front of linears, by the sites that share it."""

    matrices: dict[int | None, Transform] = field(default_factory=dict)
    inputs: dict[tuple[str, ...], Transform] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Moments:
    """S and M of one input, each relative to its trace, in float64."""

    inputs: Tensor
    weights: Tensor


def principal(network: Network, windows: Array) -> Principal:
    """Return the rotations that a network's recipe calls principal, from some windows [W, S].

    The graph's norms are folded, and nothing in it is rotated yet.
    """
    rotations, bases = network.recipe.rotations, analyse(network.graph)
    stream = residual(bases) if rotations.r1.kind == "principal" else None
    values = dict(_values(network, bases)) if rotations.r2.kind == "principal" else {}
    found = _moments(network, windows, [*([] if stream is None else [stream]), *values.values()])
    result = Principal()
    if stream is not None:
        _turn_stream(stream, found[id(stream)], rotations.r1.seed, result)
    for block, component in values.items():
        mixing = Hadamard.of(component.size, None, rotations.r2.seed + block)
        result.matrices[block] = mixing
        if component.free and found[id(component)]:
            middle = geometric_mean(_total(found[id(component)]))
            result.matrices[block] = InvertibleMatrix(mixing.apply(middle.numpy()))
    return result


def _turn_stream(
    stream: Component, found: Mapping[tuple[str, ...], Moments], seed: int, result: Principal
) -> None:
    """Add R1, and what follows it behind norms; a Hadamard where the stream cannot be turned, or need not."""
    if obstacle(stream) is not None or not found:
        result.matrices[None] = Hadamard.of(stream.size, None, seed)
        return
    rotation = principal_directions(list(found.values()))
    result.matrices[None] = OrthogonalMatrix(rotation.numpy())
    for number, (sites, moments) in enumerate(found.items()):
        scale = balance(moments, rotation)
        mixing = Hadamard.of(len(scale), None, seed + number)
        result.inputs[sites] = Composition((Diagonal(scale.numpy()), mixing))


def principal_directions(moments: list[Moments]) -> Tensor:
    """Return R [n, n], in its columns the eigenvectors of the mean of S - M."""
    difference = torch.stack([pair.inputs - pair.weights for pair in moments]).mean(0)
    return torch.linalg.eigh(difference)[1]


def balance(moments: Moments, rotation: Tensor) -> Tensor:
    """Return c [n] of least error in the directions of a rotation."""
    power = ((rotation.mT @ moments.inputs) * rotation.mT).sum(1)
    weight = ((rotation.mT @ moments.weights) * rotation.mT).sum(1)
    scale = (_raised(weight) / _raised(power)) ** 0.25
    return (scale / scale.median()).clamp(1 / STRONGEST, STRONGEST)


def geometric_mean(moments: Moments) -> Tensor:
    """Return the symmetric T [n, n] of least error, T² being the geometric mean of S⁻¹ and M."""
    root, inverse = _power(moments.inputs, 0.5), _power(moments.inputs, -0.5)
    middle = inverse @ _power(root @ moments.weights @ root, 0.5) @ inverse
    return _power(middle / middle.diagonal().mean(), 0.5)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * _raised(values) ** exponent) @ vectors.mT


def _raised(values: Tensor) -> Tensor:
    return values.clamp_min(SMALLEST * values.mean())


def _total(found: Mapping[tuple[str, ...], Moments]) -> Moments:
    pairs = list(found.values())
    return Moments(sum(pair.inputs for pair in pairs), sum(pair.weights for pair in pairs))


def _values(network: Network, bases: Bases) -> Iterator[tuple[int, Component]]:
    """Yield the first block of each component of values, and the component."""
    known: set[int] = set()
    for block, node in attention_nodes(network.graph):
        component = bases.at(node.inputs[2])
        if component is not None and id(component) not in known:
            known.add(id(component))
            yield block, component


def _moments(
    network: Network, windows: Array, components: list[Component]
) -> dict[int, dict[tuple[str, ...], Moments]]:
    """Return the moments of all quantized inputs that lie in some components, by component and by sites."""
    split = split_blocks(network.graph)
    reading = {
        id(absorber.node): component
        for component in components
        for absorber in component.absorbers
        if absorber.consumes
    }
    quantized = {site.site for site in network.plan if site.weights.enabled or site.activations.enabled}
    found: dict[int, dict[tuple[str, ...], Moments]] = {id(component): {} for component in components}
    for block, seen in _inputs(split, windows):
        nodes = {site.name: site.node for site in block.block.sites}
        for sites in block.groups:
            component = reading.get(id(nodes[sites[0]]))
            if component is not None and quantized.issuperset(sites):
                weights = torch.cat([block.weights[site] for site in sites], 1)
                found[id(component)][sites] = _pair(seen[block.input_of[sites[0]]], weights, component.size)
    return found


def _inputs(split: Split, windows: Array) -> Iterator[tuple[TorchBlock, dict[str, Tensor]]]:
    """Yield every block with what its linears read [tokens of all windows, width], by tensor."""
    context = split.context(windows.shape[1])
    with torch.no_grad():
        x = torch.cat([split.embed(window) for window in windows])
        for graph in split.blocks:
            block = TorchBlock(graph)
            names = {block.input_of[sites[0]] for sites in block.groups}
            seen = block.run(block.begin(x, context), [*names, graph.output])
            x = seen[graph.output]
            yield block, {name: seen[name].flatten(0, -2) for name in names}


def _pair(x: Tensor, weights: Tensor, size: int) -> Moments:
    """Return the moments of an input [tokens, width] and of what it multiplies [width, N].

    Both are summed over parts of `size` channels. Tokens count alike: each has scales of its own.
    """
    rows = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-20)).reshape(-1, size)
    parts = weights.reshape(-1, size, weights.shape[1]).movedim(1, 0).flatten(1)
    second, gram = (rows.mT @ rows).double(), (parts @ parts.mT).double()
    return Moments(second / second.trace(), gram / gram.trace())
