"""The path of `rotexport build`, top to bottom: from a PyTorch model to validated graphs and engines."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from transformers import PreTrainedModel

from rotexport.blocks.calibration import Behind, Network, run_blocks, solve_blocks
from rotexport.blocks.head import head_correction
from rotexport.blocks.sensitivity import sensitivities, widen
from rotexport.blocks.split import split_blocks
from rotexport.checkpoint import Checkpoint, open_checkpoint
from rotexport.doctor import require
from rotexport.errors import TargetError, ValidationError
from rotexport.export import export
from rotexport.graph.basis import analyse
from rotexport.graph.io import Scratch, WeightFile, save_model
from rotexport.graph.sites import linears, output_head
from rotexport.graph.twin import runnable
from rotexport.graph.weights import Array
from rotexport.learning.flat import learn_affine
from rotexport.learning.network import block_method, check_learnable, distill_network
from rotexport.learning.principal import WINDOWS as PRINCIPAL_WINDOWS
from rotexport.learning.principal import principal
from rotexport.learning.spin import spin
from rotexport.observe import observe_inputs, observe_keys, observe_power, outliers
from rotexport.output import MODEL, ROTATIONS, OutputDirectory
from rotexport.passes.fuse_key_rotations import FuseKeyRotations
from rotexport.passes.smooth_inputs import SmoothDownInputs
from rotexport.pipeline import (
    Calibrated,
    Pipeline,
    affine_passes,
    check_attention,
    expected_kernels,
    folding_passes,
    learned_passes,
    plan_sites,
    principal_passes,
    quantization_passes,
    rotation_passes,
    settle,
)
from rotexport.progress import Stage, Stages, Verbosity
from rotexport.quant.calibrate import InputStatistics
from rotexport.quant.operators import with_operators
from rotexport.quant.plan import SitePlan, massive_sites_dynamic
from rotexport.quant.scales import WeightQuantizer
from rotexport.recipe import Recipe, load_recipe
from rotexport.reference import reference_model
from rotexport.report import BuildReport, write_report
from rotexport.report.record import Findings, make_report, summarize_components, write_manifest
from rotexport.steps import Steps
from rotexport.targets.builder import EngineRequest, build_engines
from rotexport.targets.capabilities import check
from rotexport.targets.profiles import Profiles
from rotexport.texts import Samples, spread
from rotexport.transforms.rotation_file import write_rotations
from rotexport.validate import PassValidator, Proof, observe_reference, prove

SMOOTHING_WINDOWS = 4  # their tokens are many more than what one number per channel needs


@dataclass(frozen=True)
class BuildOptions:
    """What a build does besides numbers.

    `gpus` are compute capabilities (`sm89`); `calibration` is a text file, by default Python's own prose;
    `profiles` bounds the calls that engines accept; `plugins` is our library of CUDA kernels, for the target
    `tensorrt` alone, which must be loaded before its engines are. `resume` keeps the blocks whose weights
    are chosen, and a build that finds some there continues behind them.
    """

    target: str = "onnx"
    gpus: tuple[str, ...] = ()
    calibration: Path | None = None
    profiles: Profiles = field(default_factory=Profiles)
    plugins: Path | None = None
    resume: Path | None = None
    validate: bool = True
    force: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Prepared:
    """What is known, and found legal, before any weight is read."""

    source: str
    recipe: Recipe
    gpus: tuple[str, ...]
    checkpoint: Checkpoint
    samples: Samples
    graph: gs.Graph
    plan: list[SitePlan]
    notes: tuple[str, ...] = ()


def build(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    recipe: str | Recipe = "fp16",
    options: BuildOptions | None = None,
    stages: Stages | None = None,
) -> BuildReport:
    """Compile `model` into the directory `out`; return its report.

    Args:
        model: a Hugging Face directory or hub id, a .gguf file, or a loaded transformers model.
        out: must not exist (or be a build, with `options.force`); appears only when everything succeeded.
        recipe: a preset's name, a YAML file, or a `Recipe`.
        options: target, engines, calibration; by default an ONNX graph without engines.
        stages: hears about progress; by default nothing is printed.

    Raises:
        RotexportError: bad input, an impossible recipe, a failed stage. A build that missed its thresholds is
            kept beside `out`, with `.failed` appended to its name.

    """
    options = options or BuildOptions()
    stages = stages or Stages(Verbosity.QUIET)
    output = OutputDirectory(Path(out), force=options.force)
    output.check()
    prepared = prepare(model, recipe, options, stages)
    with output as folder:
        report = _compile(prepared, options, folder, stages)
        if report.proof is not None and not report.proof.passed:
            _refuse(output, report.proof)
    return report


def prepare(
    model: str | Path | PreTrainedModel, recipe: str | Recipe, options: BuildOptions, stages: Stages
) -> Prepared:
    """Open and export a model, and decide whether recipe and target are possible; no weight is read."""
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    gpus = check(options.target, options.gpus, recipe)
    require(options.target, gpus)
    if options.plugins is not None and options.target != "tensorrt":
        raise TargetError(f"target {options.target} runs no plugins; leave out --plugins {options.plugins}")
    with stages("open"):
        checkpoint = open_checkpoint(model, trust_remote_code=options.trust_remote_code)
        recipe, notes = settle(recipe, checkpoint.config)
        samples = Samples.of(checkpoint, options.calibration, recipe.calibration_windows)
        if recipe.attention.streaming and options.validate:
            samples = samples.within(recipe.attention.reach)
    with stages("export"):
        graph = export(checkpoint)
        plan = plan_sites(graph, recipe)
        if recipe.reconstruct.enabled or recipe.distill.enabled:
            check_learnable(plan)
        if recipe.correct_head.enabled:
            output_head(graph)
        if options.plugins is not None:  # without kernels of ours TensorRT runs its own products
            plan = with_operators(plan)
        check_attention(graph, recipe)
    return Prepared(_source(model), recipe, gpus, checkpoint, samples, graph, plan, notes)


def _compile(prepared: Prepared, options: BuildOptions, folder: Path, stages: Stages) -> BuildReport:
    recipe, graph, samples, plan = prepared.recipe, prepared.graph, prepared.samples, prepared.plan
    found = Findings(prepared.source, recipe, options.target, samples.source, plan=plan)
    found.notes += prepared.notes
    found.components = summarize_components(analyse(graph))
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch_folder:
        scratch = Scratch(Path(scratch_folder))
        pipeline = Pipeline(graph, PassValidator(scratch, samples.tokens) if options.validate else None)

        if options.validate:
            with stages("reference") as stage:
                torch_model = reference_model(prepared.checkpoint)
                reference = observe_reference(torch_model, samples.tokens, samples.windows, stage.advance)
                del torch_model

        steps = Steps(graph, recipe, samples.calibration, found, stages, options.validate and recipe.learns)
        steps.measure("as exported")
        with stages("rotate") as stage:
            if options.validate:
                found.outliers_before = outliers(observe_inputs(graph, scratch, [samples.tokens]))
            _rotate(prepared, pipeline, scratch, stage)
            if options.validate and recipe.rotations.enabled:
                found.outliers_after = outliers(observe_inputs(graph, scratch, [samples.tokens]))

        kept = options.resume or scratch.directory / "blocks"
        if recipe.rotations.enabled or recipe.smoothing != "none":
            steps.measure("rotated" if recipe.rotations.enabled else "balanced")
        _learn_transforms(prepared, pipeline, kept, steps)
        calibrated = _calibrate(prepared, scratch, kept, steps)
        plan = found.plan

        with stages("quantize") as stage:
            pipeline.run(quantization_passes(recipe, plan, calibrated), stage.detail)
            if options.plugins is not None:
                pipeline.run([FuseKeyRotations()], stage.detail)

        with stages("write"):
            save_model(graph, folder / MODEL, WeightFile(folder / f"{MODEL}.data", source=scratch))
            prepared.checkpoint.save_assets(folder)
            (folder / "recipe.yaml").write_text(recipe.to_yaml())
            if recipe.rotations.in_file:
                write_rotations(folder / ROTATIONS, pipeline.folded_rotations())

        if options.validate:
            with stages("validate") as stage:
                path = runnable(graph, folder / MODEL, scratch)
                view = pipeline.stream_view()
                found.proof = prove(reference, path, recipe.thresholds, view, stage.advance)

    if prepared.gpus:
        with stages("engines") as stage:
            request = EngineRequest(
                folder / MODEL,
                options.target,
                prepared.gpus,
                options.profiles.streaming(recipe.attention.window, recipe.attention.eviction.whole_prompts)
                if recipe.attention.streaming
                else options.profiles,
                expected_kernels(plan, recipe.dtype),
                options.plugins,
            )
            found.engines = build_engines(request, folder / "engines", stage.detail)

    found.plugins = options.plugins
    report = make_report(found, prepared.checkpoint, graph, pipeline, folder)
    report = replace(report, stages=tuple(stages.records))
    write_manifest(report, graph, folder)
    write_report(report, folder)
    return report


def _rotate(prepared: Prepared, pipeline: Pipeline, scratch: Scratch, stage: Stage) -> None:
    """Balance and rotate what the recipe wants balanced and rotated."""
    recipe, graph, windows = prepared.recipe, prepared.graph, prepared.samples.calibration
    if recipe.smoothing == "down":
        power = observe_power(graph, scratch, list(windows[:SMOOTHING_WINDOWS]))
        pipeline.run([SmoothDownInputs(power)], stage.detail)
    if recipe.rotations.principal:
        pipeline.run(folding_passes(), stage.detail)
        seen = spread(windows, PRINCIPAL_WINDOWS)
        found = principal(Network(graph, prepared.plan, {}, recipe), seen)
        pipeline.run(principal_passes(found), stage.detail)
    pipeline.run(rotation_passes(recipe.rotations), stage.detail)


def _learn_transforms(prepared: Prepared, pipeline: Pipeline, kept: Path, steps: Steps) -> None:
    """Turn R1 and R2 further from where the recipe starts them; put learned maps in front of linears.

    Settles the plan as far as learned clips change it.
    """
    recipe, windows = prepared.recipe, prepared.samples.calibration
    found, stages = steps.found, steps.stages
    network = steps.network()
    if recipe.rotations.learned:
        with stages("learn rotations") as stage:
            learned = spin(network, windows, kept / "rotations", stage.advance)
            pipeline.run(learned_passes(learned.matrices), stage.detail)
            found.notes.append(learned.note)
        steps.measure("rotations learned")
    if recipe.learn_affine.enabled:
        with stages("learn transforms") as stage:
            flat = learn_affine(network, windows, kept / "transforms", stage.advance)
            pipeline.run(affine_passes(flat.flattening), stage.detail)
            found.plan = flat.plan
            found.notes.append(flat.note)
        steps.measure("transforms learned")


def _calibrate(prepared: Prepared, scratch: Scratch, kept: Path, steps: Steps) -> Calibrated:
    """Run the rotated graph on the calibration text as far as the recipe needs; settle the plan."""
    recipe, graph, windows = prepared.recipe, prepared.graph, prepared.samples.calibration
    found, stages = steps.found, steps.stages
    statistics: dict[str, InputStatistics] = {}
    if any(site.activations.enabled and site.activations.mode == "static" for site in found.plan):
        with stages("calibrate"):
            statistics = observe_inputs(graph, scratch, list(windows))
            found.plan, notes = massive_sites_dynamic(found.plan, statistics)
            found.notes += notes

    key_means: dict[int, Array] = {}
    if recipe.kv_cache.center:
        with stages("center keys"):
            key_means = observe_keys(graph, scratch, list(windows), recipe.attention.sinks)

    if recipe.mixed.enabled:
        with stages("sensitivity") as stage:
            found.sensitivities = sensitivities(
                steps.network(statistics), windows, recipe.mixed, stage.advance
            )
            outputs = {linear.name: int(linear.weight.shape[1]) for linear in linears(graph)}
            found.plan, notes = widen(found.plan, found.sensitivities, outputs, recipe.mixed)
            found.notes += notes

    solved: dict[str, WeightQuantizer] = {}
    behind: Behind | None = None
    steps.search_clips(statistics, solved)
    network = steps.network(statistics)
    if recipe.reconstruct.enabled or any(
        site.weights.enabled and site.weights.method == "gptq" for site in found.plan
    ):
        with stages("blocks") as stage:
            method = block_method(recipe)
            seen = spread(windows, recipe.gptq.windows or len(windows))
            chosen = solve_blocks(network, method, seen, kept, stage.advance)
            solved, found.blocks, behind = chosen.weights, chosen.results, chosen.behind
        steps.measure("weights chosen", statistics, solved)
        steps.search_clips(statistics, solved)
        network = steps.network(statistics)
        behind = None if recipe.clip_search.enabled else behind
    if recipe.distill.enabled:
        with stages("distill") as stage:
            distilled = distill_network(network, solved, windows, kept, stage.advance)
            found.plan, solved = distilled.plan, distilled.solved
            found.notes.append(distilled.note)
            behind = None
        steps.measure("distilled", statistics, solved)
    head = _correct_head(prepared, statistics, solved, behind, steps) if recipe.correct_head.enabled else None
    return Calibrated(statistics, key_means, solved, head)


def _correct_head(
    prepared: Prepared,
    statistics: Mapping[str, InputStatistics],
    solved: Mapping[str, WeightQuantizer],
    behind: Behind | None,
    steps: Steps,
) -> Array:
    """Return what the head takes up; `behind` are the streams behind the blocks, if nothing changed since."""
    correct, graph = prepared.recipe.correct_head, prepared.graph
    seen = spread(prepared.samples.calibration, correct.windows)
    with steps.stages("correct head") as stage:
        if behind is None or not np.array_equal(behind.windows, seen):
            behind = run_blocks(steps.network(statistics), solved, seen, stage.advance)
        head = head_correction(split_blocks(graph), behind, correct.ridge)
    steps.found.notes.append(head.note)
    return head.matrix


def _refuse(output: OutputDirectory, proof: Proof) -> None:
    """Keep a build that missed its thresholds where nobody takes it for a good one."""
    failed = output.keep_failed()
    try:
        proof.require()
    except ValidationError as error:
        raise ValidationError(f"{error}; the build and its report are kept at '{failed}'") from None


def _source(model: str | Path | PreTrainedModel) -> str:
    if isinstance(model, PreTrainedModel):
        return f"a loaded {type(model).__name__}"
    path = Path(model)
    return str(path.resolve()) if path.exists() else str(model)
