"""What happens to each linear site: its schemes, made concrete and checked before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Final

import onnx_graphsurgeon as gs

from rotexport.errors import GraphError, RecipeError
from rotexport.quant.calibrate import InputStatistics
from rotexport.quant.scheme import ActivationScheme, WeightScheme, group_size

LEAST_GROUPS: Final = 2  # TensorRT-RTX dequantizes a matrix with one block along K anew on every run
MASSIVE_RATIO: Final = 50.0
MASSIVE_SHARE: Final = 0.02


class WeightForm(Enum):
    """How a quantized weight enters its product."""

    PLAIN = "one DequantizeLinear, per channel or blocked"
    TWO_LEVEL = "per group an integer factor, per channel a float scale: still one integer product"
    GROUPED = "one integer product per group, scaled and summed"


@dataclass(frozen=True)
class SitePlan:
    """One linear: its site name, its MatMul node's name, its input width K, and its schemes.

    `operator`: it becomes a QuantizedLinear operator (`rotexport.quant.operators`), not standard nodes.
    `clips` is the file of what was learned for the ranges of its weight (`rotexport.quant.clipped`).

    Raises:
        RecipeError: the schemes do not go together, or a group does not divide K.

    """

    site: str
    node: str
    inputs: int
    weights: WeightScheme
    activations: ActivationScheme
    operator: bool = False
    clips: Path | None = None

    def __post_init__(self) -> None:
        weight_group, activation_group = self.weight_group, self.activation_group
        if not self.activations.enabled:
            return
        if not self.weights.enabled:
            if activation_group != self.inputs:
                raise RecipeError(
                    f"site {self.site}: activations.group {activation_group} needs quantized weights; "
                    "set weights.format, or activations.group to null"
                )
            return
        formats = (self.weights.format, self.activations.format)
        if formats.count("fp8") == 1:
            raise RecipeError(
                f"site {self.site}: {formats[0]} weights cannot be multiplied with {formats[1]} activations; "
                "make both fp8, or neither"
            )
        if "fp8" in formats and (weight_group != self.inputs or activation_group != self.inputs):
            raise RecipeError(f"site {self.site}: fp8 products have no group scales; set both groups to null")
        if weight_group != activation_group and self.inputs not in (weight_group, activation_group):
            raise RecipeError(
                f"site {self.site}: weights.group {weight_group} and activations.group {activation_group} "
                "differ; make them equal, or one of them null"
            )

    @property
    def weight_group(self) -> int:
        """Input channels that share a weight scale."""
        return group_size(self.weights.group, self.inputs, "weights.group", f"site {self.site}", LEAST_GROUPS)

    @property
    def activation_group(self) -> int:
        """Input channels that share an activation scale."""
        where = f"site {self.site}"
        return group_size(self.activations.group, self.inputs, "activations.group", where, LEAST_GROUPS)

    @property
    def product_group(self) -> int:
        """Input channels summed by one integer product."""
        return min(self.weight_group, self.activation_group)

    @property
    def form(self) -> WeightForm:
        """How the weight enters its product.

        Blocked scales behind quantized activations are never left to a runtime: TensorRT-RTX 1.7 applies
        only the first block's.
        """
        if not self.weights.enabled or not self.activations.enabled or self.product_group == self.inputs:
            return WeightForm.PLAIN
        small = self.weights.format == "int4"  # times a factor still within int8
        if self.activation_group == self.inputs and small:
            return WeightForm.TWO_LEVEL
        return WeightForm.GROUPED


def massive_sites_dynamic(
    plan: Sequence[SitePlan], statistics: Mapping[str, InputStatistics]
) -> tuple[list[SitePlan], list[str]]:
    """Make static sites with massive activations dynamic per token; return the plan and what to report.

    A static scale must hold the largest token; where that is over 50 times the median token's maximum, the
    median token keeps two or three levels. At most 2 % of the MatMuls change: the worst first, all
    MatMuls that read one input together.
    """
    static = [site for site in plan if site.activations.enabled and site.activations.mode == "static"]
    massive = [site for site in static if statistics[site.site].token_ratio > MASSIVE_RATIO]
    by_input: dict[int, list[SitePlan]] = {}
    for site in sorted(massive, key=lambda s: statistics[s.site].token_ratio, reverse=True):
        by_input.setdefault(id(statistics[site.site]), []).append(site)
    room = int(MASSIVE_SHARE * len(plan))
    notes, chosen = [], set()
    for sites in by_input.values():
        names = ", ".join(site.site for site in sites)
        ratio = statistics[sites[0].site].token_ratio
        fact = f"{names}: largest token {ratio:.0f} times the median token's maximum"
        if len(sites) <= room:
            room -= len(sites)
            chosen |= {site.site for site in sites}
            notes.append(f"{fact}; activations made dynamic per token")
        else:
            notes.append(f"{fact}; kept static: at most {MASSIVE_SHARE:.0%} of the MatMuls become dynamic")
    changed = [
        replace(site, activations=replace(site.activations, mode="dynamic")) if site.site in chosen else site
        for site in plan
    ]
    return changed, notes


def planned_nodes(graph: gs.Graph, plan: Sequence[SitePlan]) -> dict[str, gs.Node]:
    """Return the MatMul of every planned site, by site name.

    Raises:
        GraphError: the graph has no MatMul of a planned name.

    """
    named = {node.name: node for node in graph.nodes if node.op == "MatMul"}
    for site in plan:
        if site.node not in named:
            raise GraphError(f"site {site.site}: the graph has no MatMul named '{site.node}'")
    return {site.site: named[site.node] for site in plan}
