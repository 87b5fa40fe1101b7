"""What a build did, gathered into its report and its manifest."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rotexport import __version__
from rotexport.blocks.calibration import BlockResult
from rotexport.blocks.clips import ClipChoice
from rotexport.blocks.sensitivity import Sensitivity
from rotexport.blocks.steps import StepErrors
from rotexport.checkpoint import Checkpoint
from rotexport.graph.basis import Bases, Component, residual
from rotexport.observe import Outliers
from rotexport.output import MARK, write_json
from rotexport.passes.base import Placement
from rotexport.pipeline import Pipeline
from rotexport.quant.plan import SitePlan
from rotexport.recipe import Recipe
from rotexport.report.data import (
    BlockSummary,
    BodyCount,
    BuildReport,
    ClipSummary,
    ComponentSummary,
    EngineSummary,
    KernelCount,
    ModelSummary,
    PassSummary,
    SiteOutliers,
    SiteSensitivity,
    StepSummary,
    TransformSummary,
)
from rotexport.streaming.cache import graph_cache_bytes
from rotexport.targets.builder import EngineReport
from rotexport.targets.layers import kernels
from rotexport.validate import Proof

PACKAGES = ("torch", "transformers", "onnx", "onnx-graphsurgeon", "onnxruntime", "tensorrt-rtx", "tensorrt")


@dataclass
class Findings:
    """What the stages of a build find out, filled in one by one."""

    source: str
    recipe: Recipe
    target: str
    text: str = ""
    components: list[ComponentSummary] = field(default_factory=list)
    outliers_before: dict[str, Outliers] = field(default_factory=dict)
    outliers_after: dict[str, Outliers] = field(default_factory=dict)
    plan: list[SitePlan] = field(default_factory=list)
    blocks: list[BlockResult] = field(default_factory=list)
    sensitivities: list[Sensitivity] = field(default_factory=list)
    clips: list[list[ClipChoice]] = field(default_factory=list)
    steps: list[StepErrors] = field(default_factory=list)
    proof: Proof | None = None
    engines: list[EngineReport] = field(default_factory=list)
    plugins: Path | None = None
    notes: list[str] = field(default_factory=list)


def summarize_components(bases: Bases) -> list[ComponentSummary]:
    """Describe the components that matter to a reader: those that weights absorb on some side."""
    stream = residual(bases)
    found = [component for component in bases.components if component.absorbers]
    return [
        ComponentSummary(
            title=_title(component, component is stream),
            size=component.size,
            tensors=len(component.atoms),
            pins=tuple(dict.fromkeys(pin.reason for pin in component.pins)),
        )
        for component in found
    ]


def _title(component: Component, is_stream: bool) -> str:
    if is_stream:
        return "residual stream"
    return component.atoms[0].tensor


def summarize_placements(placements: Sequence[Placement]) -> tuple[TransformSummary, ...]:
    """Describe where transforms went."""
    return tuple(
        TransformSummary(
            p.rotation, p.site, p.where.value, p.transform.describe() if p.transform else "", p.reason
        )
        for p in placements
    )


def summarize_outliers(
    before: Mapping[str, Outliers], after: Mapping[str, Outliers]
) -> tuple[SiteOutliers, ...]:
    """Pair what was seen before rotation with what was seen after."""
    return tuple(
        SiteOutliers(
            site=site,
            ratio_before=seen.channel_ratio,
            kurtosis_before=seen.kurtosis,
            ratio_after=after[site].channel_ratio if site in after else None,
            kurtosis_after=after[site].kurtosis if site in after else None,
        )
        for site, seen in before.items()
    )


def make_report(
    findings: Findings, checkpoint: Checkpoint, graph: gs.Graph, pipeline: Pipeline, folder: Path
) -> BuildReport:
    """Gather everything that the report of a build shows, except its stages' times."""
    return BuildReport(
        model=summarize_model(checkpoint, findings.source),
        recipe=findings.recipe.name,
        description=findings.recipe.description,
        recipe_text=findings.recipe.to_yaml(),
        target=findings.target,
        gpus=tuple(engine.gpu for engine in findings.engines),
        text=findings.text,
        command=_command(findings),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions(),
        inputs=checkpoint.fingerprint() | _plugin_fingerprint(findings.plugins),
        files={str(f.relative_to(folder)): f.stat().st_size for f in _files(folder)},
        cache_bytes_per_token=cache_bytes_per_token(graph),
        cache_bytes=graph_cache_bytes(graph),
        components=tuple(findings.components),
        transforms=summarize_placements(pipeline.placements),
        passes=_passes(pipeline),
        outliers=summarize_outliers(findings.outliers_before, findings.outliers_after),
        weights=tuple(BlockSummary(b.block, b.error, b.sites) for b in findings.blocks),
        steps=tuple(StepSummary(found.step, found.blocks) for found in findings.steps),
        clips=_clips(findings),
        sensitivities=_sensitivities(findings),
        proof=findings.proof,
        engines=tuple(_engine(engine, findings.plan) for engine in findings.engines),
        notes=tuple(findings.notes),
    )


def _clips(findings: Findings) -> tuple[ClipSummary, ...]:
    return tuple(
        ClipSummary(number, ", ".join(choice.sites), choice.clip, choice.before, choice.after)
        for number, choices in enumerate(findings.clips, 1)
        for choice in choices
    )


def _sensitivities(findings: Findings) -> tuple[SiteSensitivity, ...]:
    formats = {site.site: site.weights.format for site in findings.plan}
    wider = findings.recipe.mixed.format
    return tuple(
        SiteSensitivity(found.site, found.narrow, found.wide, formats[found.site] == wider)
        for found in findings.sensitivities
    )


def summarize_model(checkpoint: Checkpoint, source: str) -> ModelSummary:
    """Describe the model that went in."""
    config = checkpoint.config
    sizes = {weight: int(np.prod(weight.shape)) for weight in map(checkpoint.weight, checkpoint.names())}
    return ModelSummary(
        name=Path(source).name,
        source=source,
        architecture=type(config).__name__,
        parameters=sum(sizes.values()),
        blocks=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
    )


def write_manifest(report: BuildReport, graph: gs.Graph, folder: Path) -> None:
    """Write `rotexport.json`: what another program needs to know of the build.

    Raises:
        OutputError: the directory cannot be written.

    """
    manifest = {
        "rotexport": __version__,
        "created": report.created,
        "source": report.model.source,
        "inputs_sha256": report.inputs,
        "recipe": report.recipe_text,
        "target": report.target,
        "engines": {engine.gpu: engine.file for engine in report.engines},
        "versions": report.versions,
        "inputs": [_port(tensor) for tensor in graph.inputs],
        "outputs": [_port(tensor) for tensor in graph.outputs],
        "cache_bytes_per_token": report.cache_bytes_per_token,
        "cache_bytes": report.cache_bytes,
        "files": report.files,
        "figures": report.proof.figures() if report.proof is not None else None,
        "stages": [
            {"name": s.name, "seconds": round(s.seconds, 3), "peak_anonymous_bytes": s.peak_anonymous_bytes}
            for s in report.stages
        ],
    }
    write_json(folder / MARK, manifest)


def cache_bytes_per_token(graph: gs.Graph) -> int:
    """Return the bytes by which one token of one row lets the key/value cache grow, scales included."""
    total = 0
    for tensor in graph.inputs:
        if tensor.name.startswith("past_key_values."):
            fixed = [int(size) for size in tensor.shape if isinstance(size, int)]
            total += int(np.prod(fixed)) * np.dtype(tensor.dtype).itemsize
    return total


def versions() -> dict[str, str]:
    """Return the versions of this package and of those whose behaviour a build depends on."""
    found = {"rotexport": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _plugin_fingerprint(library: Path | None) -> dict[str, str]:
    return {} if library is None else {library.name: hashlib.sha256(library.read_bytes()).hexdigest()}


def _command(findings: Findings) -> str:
    """Return the command that repeats a build, from inside its directory."""
    words = ["rotexport", "build", findings.source, "-o", "OUT", "--recipe", "recipe.yaml"]
    words += ["--target", findings.target]
    if findings.engines:
        words += ["--gpu", ",".join(engine.gpu for engine in findings.engines)]
    if findings.plugins:
        words += ["--plugins", str(findings.plugins)]
    return shlex.join(words)


def _passes(pipeline: Pipeline) -> tuple[PassSummary, ...]:
    validated = {r.name: r for r in pipeline.validator.records} if pipeline.validator is not None else {}
    return tuple(
        PassSummary(
            name=rewrite.name,
            preserves=rewrite.preserves.value,
            changed=report.changed,
            notes=tuple(report.notes),
            comparison=validated[rewrite.name].comparison if rewrite.name in validated else None,
        )
        for rewrite, report in pipeline.finished
    )


def _engine(engine: EngineReport, plan: Sequence[SitePlan]) -> EngineSummary:
    built = kernels(engine.layers)
    counts = Counter(
        (site.site.rpartition(".")[2], " and ".join(sorted(k.value for k in built.get(site.node, ()))))
        for site in plan
    )
    return EngineSummary(
        target=engine.target,
        gpu=engine.gpu,
        file=f"engines/{engine.path.name}",
        size=engine.size,
        seconds=engine.seconds,
        kernels=tuple(KernelCount(role, kernel, count) for (role, kernel), count in counts.items()),
        bodies=_bodies(engine),
    )


def _bodies(engine: EngineReport) -> tuple[BodyCount, ...]:
    nodes: dict[tuple[str, str], list[str]] = {}
    for refusal in engine.refused:
        nodes.setdefault((refusal.operator, refusal.reason), []).append(refusal.node)
    return tuple(BodyCount(*kind, tuple(names)) for kind, names in nodes.items())


def _files(folder: Path) -> list[Path]:
    return sorted(
        f for f in folder.rglob("*") if f.is_file() and "scratch-" not in str(f.relative_to(folder))
    )


def _port(tensor: gs.Variable) -> dict[str, Any]:
    element = onnx.TensorProto.DataType.Name(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))
    return {"name": tensor.name, "type": element.lower(), "shape": list(tensor.shape)}


def summary(report: BuildReport) -> str:
    """Return what a person wants to read when a build has finished, in a few lines."""
    lines = [f"{report.model.name}: {report.recipe} for {report.target}"]
    if report.proof is not None:
        proof = report.proof
        lines.append(
            f"against PyTorch: largest logit error {proof.comparison.max_abs_error:.3g}, "
            f"KL {proof.comparison.kl:.3g}, top-1 agreement {proof.comparison.top1_agreement:.1%}"
        )
        if proof.evaluation is not None and proof.reference_evaluation is not None:
            before, after = proof.reference_evaluation.perplexity, proof.evaluation.perplexity
            lines.append(f"perplexity: {after:.3f} (PyTorch {before:.3f})")
    lines += [
        f"engine {e.target} {e.gpu}: {e.size / 1e6:.0f} MB in {e.seconds:.1f} s" for e in report.engines
    ]
    lines += [f"note: {note}" for note in report.notes]
    lines += [
        f"note: {len(body.nodes)} {body.operator} run as their bodies: {body.reason}"
        for body in (report.engines[0].bodies if report.engines else ())
    ]
    return "\n".join(lines)


def plan_text(plan: Sequence[SitePlan]) -> str:
    """Return what would be done to every linear: one line per role and treatment."""
    roles: dict[tuple[str, str], int] = {}
    for site in plan:
        role = site.site.rpartition(".")[2]
        activations = site.activations.format
        if site.activations.enabled:
            activations += f" {site.activations.mode}, groups of {site.activation_group}"
            activations += "" if site.activations.symmetric else ", asymmetric"
        weights = site.weights.format + (f", groups of {site.weight_group}" if site.weights.enabled else "")
        weights += "" if site.weights.symmetric else ", asymmetric"
        key = (role, f"weights {weights}; activations {activations}")
        roles[key] = roles.get(key, 0) + 1
    return "\n".join(f"{count:>4} x {role:<8} {treatment}" for (role, treatment), count in roles.items())
