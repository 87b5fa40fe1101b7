"""What enters every linear, seen by running a graph: for calibration, and for the outliers of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import onnx_graphsurgeon as gs

from rotexport.graph.io import Scratch, save_model
from rotexport.graph.sites import Linear, linears
from rotexport.graph.weights import Array
from rotexport.quant.calibrate import InputStatistics, Probe, Run, calibrate, channel_power
from rotexport.runtime.model import OnnxModel
from rotexport.streaming.centering import mean_keys

BUDGET_BYTES = 256 << 20  # of activations that one run returns


@dataclass(frozen=True)
class Outliers:
    """How uneven a linear's input is.

    `channel_ratio` and `token_ratio` are the largest channel's (token's) maximum over the median one's;
    `kurtosis` is 3 for a normal distribution.
    """

    channel_ratio: float
    token_ratio: float
    kurtosis: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def observe_inputs(graph: gs.Graph, scratch: Scratch, windows: Sequence[Array]) -> dict[str, InputStatistics]:
    """Run `graph` over token windows [S] and return the statistics of every linear's input, by site."""
    return calibrate(_runner(graph, scratch), _probes(linears(graph)), windows, BUDGET_BYTES)


def observe_power(graph: gs.Graph, scratch: Scratch, windows: Sequence[Array]) -> dict[str, Array]:
    """Run `graph` over token windows [S]; return the `channel_power` of what down projections read."""
    downs = [linear for linear in linears(graph) if linear.role == "down"]
    return channel_power(_runner(graph, scratch), _probes(downs), windows, BUDGET_BYTES)


def observe_keys(graph: gs.Graph, scratch: Scratch, windows: Sequence[Array], sinks: int) -> dict[int, Array]:
    """Run `graph` over token windows [S] and return the mean key of every attention, without the `sinks`.

    Raises:
        RecipeError: no window is longer than the sinks.

    """
    return mean_keys(graph, _runner(graph, scratch), windows, sinks)


def _runner(graph: gs.Graph, scratch: Scratch) -> Run:
    path = scratch.directory / "observed.onnx"
    save_model(graph, path, scratch)

    def run(windows: Sequence[Array], names: Sequence[str]) -> Iterable[dict[str, Array]]:
        return OnnxModel(path, extra_outputs=names).forward_many(windows, names)

    return run


def outliers(statistics: Mapping[str, InputStatistics]) -> dict[str, Outliers]:
    """Reduce statistics to what a person compares before and after rotation."""
    return {
        site: Outliers(seen.channel_ratio, seen.token_ratio, seen.kurtosis)
        for site, seen in statistics.items()
    }


def _probes(sites: Sequence[Linear]) -> list[Probe]:
    readers: dict[str, list[Linear]] = {}
    for linear in sites:
        readers.setdefault(linear.input.name, []).append(linear)
    return [
        Probe(tensor, int(group[0].weight.shape[0]), tuple(linear.name for linear in group))
        for tensor, group in readers.items()
    ]
