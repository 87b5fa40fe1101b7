"""The steps of a build that settle numbers on calibration text, and what each does to the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from rotexport.blocks.calibration import Network
from rotexport.blocks.clips import search_clips
from rotexport.blocks.steps import step_errors
from rotexport.graph.weights import Array
from rotexport.progress import Stages
from rotexport.quant.calibrate import InputStatistics
from rotexport.quant.scales import WeightQuantizer
from rotexport.recipe import Recipe
from rotexport.report.record import Findings


@dataclass(frozen=True, eq=False)
class Steps:
    """Writes what steps find into `found`, and each block's error after every step if that is `measured`.

    `graph` is the one that passes rewrite; `windows` are calibration token ids [W, S].
    """

    graph: gs.Graph
    recipe: Recipe
    windows: Array
    found: Findings
    stages: Stages
    measured: bool

    def network(self, statistics: Mapping[str, InputStatistics] | None = None) -> Network:
        """Return the graph as it is now with the plan as it is now; `statistics` are those of its inputs."""
        return Network(self.graph, self.found.plan, statistics or {}, self.recipe)

    def measure(
        self,
        step: str,
        statistics: Mapping[str, InputStatistics] | None = None,
        solved: Mapping[str, WeightQuantizer] | None = None,
    ) -> None:
        """Note each block's error after a step, with the `solved` weights where there are any, by site."""
        if not self.measured:
            return
        with self.stages("errors") as stage:
            network = self.network(statistics)
            self.found.steps.append(step_errors(step, network, solved or {}, self.windows, stage.advance))

    def search_clips(
        self, statistics: Mapping[str, InputStatistics], solved: Mapping[str, WeightQuantizer]
    ) -> None:
        """Settle the clips of activations in the plan, if the recipe has them searched."""
        if not self.recipe.clip_search.enabled:
            return
        with self.stages("clips") as stage:
            network = self.network(statistics)
            self.found.plan, choices = search_clips(network, solved, self.windows, stage.advance)
            self.found.clips.append(choices)
        self.measure("clips again" if solved else "clips", statistics, solved)
