"""`rotexport inspect`: the basis components of a model, where transforms would go, and outliers."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from rotexport.checkpoint import open_checkpoint
from rotexport.export import export
from rotexport.graph.basis import analyse
from rotexport.graph.io import Scratch, load_model
from rotexport.observe import observe_inputs, outliers
from rotexport.pipeline import Pipeline, rotation_passes
from rotexport.progress import Stages
from rotexport.recipe import load_recipe
from rotexport.report import read_report
from rotexport.report.data import ComponentSummary, SiteOutliers, TransformSummary
from rotexport.report.record import summarize_components, summarize_outliers, summarize_placements
from rotexport.report.serialize import to_plain
from rotexport.revalidate import is_build
from rotexport.texts import SAMPLE_LENGTH, Samples, random_windows


@dataclass(frozen=True)
class Inspection:
    """What `rotexport inspect` prints."""

    components: tuple[ComponentSummary, ...]
    transforms: tuple[TransformSummary, ...]
    outliers: tuple[SiteOutliers, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @property
    def text(self) -> str:
        """The inspection as tables for a terminal; what differs in its block only is one line."""
        return "\n".join([*self._component_lines(), *self._transform_lines(), *self._outlier_lines()])

    def _component_lines(self) -> list[str]:
        counts = Counter((_kind(c.title), c.size, tuple(map(_kind, c.pins))) for c in self.components)
        lines = [f"{'count':>5}  {'size':>6}  {'component':<36} pinned by"]
        for (title, size, pins), count in counts.items():
            lines.append(f"{count:>5}  {size:>6}  {title:<36} {'; '.join(dict.fromkeys(pins)) or 'free'}")
        return lines

    def _transform_lines(self) -> list[str]:
        counts = Counter(
            (t.rotation, _kind(t.site), t.where, t.transform, _kind(t.reason)) for t in self.transforms
        )
        lines = ["", f"{'count':>5}  {'rotation':<8} {'site':<10} {'where':<8} transform; reason"]
        for (rotation, site, where, transform, reason), count in counts.items():
            said = "; ".join(part for part in (transform, reason) if part)
            lines.append(f"{count:>5}  {rotation:<8} {site:<10} {where:<8} {said}")
        return lines

    def _outlier_lines(self) -> list[str]:
        lines = ["", f"{'linear':<12} {'max/median':>10} {'rotated':>9} {'kurtosis':>10} {'rotated':>9}"]
        for site in self.outliers:
            lines.append(
                f"{site.site:<12} {site.ratio_before:>10.1f} {_figure(site.ratio_after):>9} "
                f"{site.kurtosis_before:>10.1f} {_figure(site.kurtosis_after):>9}"
            )
        return lines


def inspect(model: str, recipe: str, text: Path | None, stages: Stages) -> Inspection:
    """Inspect a model, a build or a canonical `.onnx` file.

    A build prints what its report holds. Anything else is rotated as `recipe` says, and its linears' inputs
    are observed before and after, on `text`, or on prose, or on random tokens where there is no tokenizer.

    Raises:
        RotexportError: the model cannot be opened, or has a piece that the analysis cannot treat.

    """
    if is_build(model):
        report = read_report(Path(model))
        return Inspection(report.components, report.transforms, report.outliers)
    rotations = load_recipe(recipe).rotations
    with stages("open"):
        graph, tokens = _open(model, text)
        components = tuple(summarize_components(analyse(graph)))
    with stages("observe"), tempfile.TemporaryDirectory(prefix="rotexport-") as folder:
        scratch = Scratch(Path(folder))
        before = outliers(observe_inputs(graph, scratch, [tokens]))
        pipeline = Pipeline(graph, None)
        pipeline.run(rotation_passes(rotations), lambda name: None)
        after = outliers(observe_inputs(graph, scratch, [tokens]))
    return Inspection(
        components, summarize_placements(pipeline.placements), summarize_outliers(before, after)
    )


def _open(model: str, text: Path | None) -> tuple[gs.Graph, np.ndarray[Any, Any]]:
    if model.endswith(".onnx"):
        graph = load_model(Path(model))
        vocabulary = next(t.shape[-1] for t in graph.outputs if t.name == "logits")
        return graph, random_windows(int(vocabulary), SAMPLE_LENGTH, 1)[0]
    checkpoint = open_checkpoint(model)
    samples = Samples.of(checkpoint)
    if text is not None:
        samples = samples.proving_on(checkpoint, text)
    return export(checkpoint), samples.tokens


def _kind(name: str) -> str:
    """Return a name without the number of its block, so that blocks that are alike count as one kind."""
    return re.sub(r"\d+", "N", name)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
