"""Which passes a recipe asks for, in which order, and running them under validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from transformers import PretrainedConfig

from rotexport.graph.basis import attention_nodes, new_key
from rotexport.graph.edit import sort
from rotexport.graph.sites import linears
from rotexport.graph.twin import float32_twin
from rotexport.graph.weights import Array
from rotexport.learning.flat_block import Flattening
from rotexport.learning.principal import Principal
from rotexport.passes.base import Pass, PassReport, Placement
from rotexport.passes.center_layernorms import CenterLayerNorms
from rotexport.passes.correct_head import CorrectHead
from rotexport.passes.fold_norms import FoldNorms
from rotexport.passes.lasting_positions import LastingPositions
from rotexport.passes.place_linears import PlaceLinears
from rotexport.passes.precision import SetPrecision
from rotexport.passes.quantize_activations import QuantizeActivations
from rotexport.passes.quantize_cache import QuantizeCache
from rotexport.passes.quantize_weights import QuantizeWeights
from rotexport.passes.rotate_heads import RotateHeads
from rotexport.passes.rotate_inputs import MixHeads, RotateDownInputs
from rotexport.passes.rotate_residual import RotateResidual
from rotexport.passes.rotation import Given
from rotexport.passes.share_weights import ShareWeights
from rotexport.passes.stream_attention import StreamAttention
from rotexport.passes.transform_heads import TransformKeys, TransformValues
from rotexport.passes.transform_inputs import TransformInputs
from rotexport.quant.calibrate import InputStatistics
from rotexport.quant.plan import SitePlan
from rotexport.quant.scales import WeightQuantizer
from rotexport.recipe import Recipe, Rotations
from rotexport.targets.layers import Kernel, expected_kernel
from rotexport.transforms.transform import Composition, Transform
from rotexport.validate import PassValidator, StreamView

DTYPES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass
class Pipeline:
    """A graph on its way through passes; every pass is checked by running the graph before and after it."""

    graph: gs.Graph
    validator: PassValidator | None
    finished: list[tuple[Pass, PassReport]] = field(default_factory=list)

    def run(self, passes: Iterable[Pass], announce: Callable[[str], None]) -> None:
        """Run passes in order.

        Raises:
            ValidationError: a pass changed the function more than it promises.

        """
        for rewrite in passes:
            announce(rewrite.name)
            if self.validator is not None and not self.finished:
                self.validator.start(float32_twin(self.graph))
            report = rewrite.run(self.graph)
            sort(self.graph)
            self.finished.append((rewrite, report))
            if self.validator is not None:
                self.validator.check(rewrite, report.changed, float32_twin(self.graph))

    @property
    def placements(self) -> list[Placement]:
        """Where every transform went."""
        return [placement for _, report in self.finished for placement in report.placements]

    def folded_rotations(self) -> dict[int | None, Transform]:
        """Return what the residual stream (under None) and each block's values were rotated by in all."""
        factors: dict[int | None, list[Transform]] = {}
        for placement in self.placements:
            if placement.rotation in ("r1", "r2") and placement.transform is not None:
                block = None if placement.rotation == "r1" else int(placement.site.partition(".")[0])
                factors.setdefault(block, []).append(placement.transform)
        return {block: Composition(tuple(transforms)) for block, transforms in factors.items()}

    def stream_view(self) -> StreamView:
        """Return how the graph's residual stream relates to PyTorch's, after what the passes did to it."""
        rotated = [p.transform for p in self.placements if p.rotation == "r1" and p.transform is not None]
        centered = any(isinstance(p, CenterLayerNorms) and report.changed for p, report in self.finished)
        return StreamView.after(Composition(tuple(rotated)) if rotated else None, centered)


def folding_passes() -> list[Pass]:
    """Return the passes that leave norms without anything to learn, as turning the residual stream needs."""
    return [CenterLayerNorms(), FoldNorms()]


def rotation_passes(rotations: Rotations) -> list[Pass]:
    """Return the passes that leave the function as it is, in the order they must run.

    Principal rotations are left out: they, and the folding before them, are done then.
    """
    if not rotations.enabled:
        return []
    passes: list[Pass] = []
    if rotations.r1.enabled and rotations.r1.kind != "principal":
        passes = [] if rotations.principal else folding_passes()
        passes.append(RotateResidual(rotations.r1))
    if rotations.r2.enabled and rotations.r2.kind != "principal":
        passes.append(RotateHeads(rotations.r2, "r2"))
    if rotations.r3.enabled:
        passes.append(RotateHeads(rotations.r3, "r3"))
    if rotations.r4.enabled:
        passes.append(RotateDownInputs(rotations.r4))
    if rotations.o_heads.enabled:
        passes.append(MixHeads())
    return passes


@dataclass(frozen=True)
class Calibrated:
    """What calibration text decided.

    `statistics` of inputs, by site, are for static activations; `key_means` of layers for centred caches;
    `solved` weights, by site, were chosen block by block; `head` [K, K] is what corrects the output head.
    """

    statistics: Mapping[str, InputStatistics] = field(default_factory=dict)
    key_means: Mapping[int, Array] = field(default_factory=dict)
    solved: Mapping[str, WeightQuantizer] = field(default_factory=dict)
    head: Array | None = None


def learned_passes(learned: Mapping[int | None, Transform]) -> list[Pass]:
    """Return the passes that turn R1 (under None) and R2 (by block) further, by what was learned."""
    passes: list[Pass] = [RotateResidual(Given(learned))] if None in learned else []
    return [*passes, RotateHeads(Given(learned), "r2")] if set(learned) - {None} else passes


def principal_passes(found: Principal) -> list[Pass]:
    """Return the passes that rotate, and balance what norms hand to linears, as calibration text says."""
    passes = learned_passes(found.matrices)
    return [*passes, TransformInputs(found.inputs)] if found.inputs else passes


def affine_passes(learned: Flattening) -> list[Pass]:
    """Return the passes that put affine transforms in: values first, while nothing is online behind them."""
    passes: list[Pass] = [TransformValues(learned.values)] if learned.values else []
    passes += [TransformKeys(learned.keys)] if learned.keys else []
    return [*passes, TransformInputs(learned.inputs)] if learned.inputs else passes


def quantization_passes(recipe: Recipe, plan: Sequence[SitePlan], calibrated: Calibrated) -> list[Pass]:
    """Return the passes that change numbers, then the one that stores equal ones once."""
    passes: list[Pass] = [] if calibrated.head is None else [CorrectHead(calibrated.head)]
    passes.append(SetPrecision(DTYPES[recipe.dtype]))
    if any(site.weights.enabled for site in plan):
        passes.append(QuantizeWeights(plan, calibrated.solved))
    if any(site.operator for site in plan):
        passes.append(PlaceLinears(plan))
        plan = [site for site in plan if not site.operator]
    if any(site.activations.enabled for site in plan):
        passes.append(QuantizeActivations(plan, calibrated.statistics))
    if recipe.attention.streaming:
        ring = recipe.attention.cache_format(recipe.kv_cache)
        passes += [StreamAttention(recipe.attention, ring, calibrated.key_means), LastingPositions()]
    elif recipe.kv_cache.enabled:
        passes.append(QuantizeCache(recipe.kv_cache))
    return [*passes, ShareWeights()]


def plan_sites(graph: gs.Graph, recipe: Recipe) -> list[SitePlan]:
    """Give every linear its schemes, before any weight is read, and its MatMul the site's name.

    Raises:
        RecipeError: an override matches nothing, a group does not divide, or schemes do not go together.

    """
    sites = linears(graph)
    recipe.check_sites(site.name for site in sites)
    for site in sites:
        site.node.name = site.name  # what builders say about a kernel then names the site
    return [
        SitePlan(site.name, site.node.name, int(site.weight.shape[0]), *recipe.schemes(site.name))
        for site in sites
    ]


def settle(recipe: Recipe, config: PretrainedConfig) -> tuple[Recipe, tuple[str, ...]]:
    """Take from a model's configuration what a recipe leaves open; return notes of what was taken.

    Raises:
        RecipeError: the configuration does not say it, or says what the recipe cannot have.

    """
    context = getattr(config, "max_position_embeddings", None)
    attention = recipe.attention.for_context(context)
    if attention == recipe.attention:
        return recipe, ()
    note = f"attention.eviction.context: {context} tokens, the model's max_position_embeddings"
    return replace(recipe, attention=attention), (note,)


def check_attention(graph: gs.Graph, recipe: Recipe) -> None:
    """Swap attention in a copy of an exported graph, to see before any weight is read whether it can be.

    Raises:
        RotexportError: as `StreamAttention.run`.

    """
    if recipe.attention.streaming:
        ring = recipe.attention.cache_format(recipe.kv_cache)
        keys = {number: new_key(node).shape for number, node in attention_nodes(graph)}
        means = {number: np.zeros((heads, size)) for number, (_, heads, _, size) in keys.items()}
        StreamAttention(recipe.attention, ring, means).run(graph.copy())


def expected_kernels(plan: Sequence[SitePlan], dtype: str) -> dict[str, Kernel]:
    """Return what every linear must become in an engine, by node name."""
    return {
        site.node: Kernel.PLUGIN
        if site.operator
        else expected_kernel(site.weights.format, site.activations.format, dtype)
        for site in plan
    }
