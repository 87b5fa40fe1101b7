"""Looking again at finished builds: the proof on another text, and perplexities."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rotexport.checkpoint import open_checkpoint
from rotexport.errors import RecipeError, RotexportError
from rotexport.evaluate import Evaluation, LanguageModel, evaluate
from rotexport.graph.io import Scratch, load_model
from rotexport.graph.twin import runnable
from rotexport.graph.weights import Array
from rotexport.output import MARK, MODEL, ROTATIONS, read_manifest, write_json
from rotexport.passes.base import Where
from rotexport.passes.center_layernorms import CenterLayerNorms
from rotexport.progress import Stages
from rotexport.recipe import Recipe, Rotation, parse_recipe
from rotexport.reference import reference_model
from rotexport.report import read_report, write_report
from rotexport.report.serialize import to_plain
from rotexport.runtime.opening import open_graph
from rotexport.runtime.session import Session
from rotexport.streaming.evaluate import (
    BUCKET,
    StreamComparison,
    evaluate_dense,
    evaluate_stream,
    without_sinks,
)
from rotexport.texts import Samples, read_text, token_windows
from rotexport.validate import Proof, StreamView, observe_reference, prove


def is_build(path: str | Path) -> bool:
    """Whether a path is the directory of a finished build."""
    return (Path(path) / MARK).is_file()


def evaluate_path(model: str, text: Path, windows: int | None, length: int, stages: Stages) -> Evaluation:
    """Return the perplexity of a build's graph, or of a PyTorch model, over a text file.

    Args:
        model: a build's directory, or anything `open_checkpoint` takes.
        text: UTF-8; tokenized once as a whole, with the special tokens that the tokenizer itself adds.
        windows: how many, from the start; None for all that are full.
        length: tokens per window; every window starts from an empty cache.
        stages: hears about progress.

    Raises:
        RotexportError: the model or the text cannot be read, or the text is too short.

    """
    with stages("open"):
        content = read_text(text)
        language_model, tokenizer = _open(model)
        ids = token_windows(tokenizer, content, length, windows)
    with stages("evaluate") as stage:
        return evaluate(language_model, ids, stage.advance)


@dataclass(frozen=True)
class StreamRequest:
    """What to read as one stream: `tokens` of a text (None for all), reported by `bucket` of positions.

    `dense` asks for the PyTorch model beside it, which is at `model`, by default where it was at the build.
    """

    text: Path
    tokens: int | None = None
    bucket: int = BUCKET
    dense: bool = True
    model: str | None = None


def evaluate_streams(folder: Path, request: StreamRequest, stages: Stages) -> StreamComparison:
    """Read a text as one stream through a streaming build, with and without its sinks; add it to the report.

    Raises:
        RotexportError: the build does not stream, the text is too short, or the PyTorch model is gone.

    """
    with stages("open"):
        manifest = read_manifest(folder)
        recipe = parse_recipe(str(manifest["recipe"]), str(folder / MARK))
        if not recipe.attention.streaming:
            raise RecipeError(f"'{folder}' is dense; build it with --set attention.kind=streaming")
        report = read_report(folder)
        checkpoint = open_checkpoint(request.model or str(manifest["source"])) if request.dense else None
        tokens = _stream_tokens(folder, request)
    with stages("stream") as stage:
        stream = evaluate_stream(Session(folder), tokens, request.bucket, stage.advance)
    window_only = dense = None
    if recipe.attention.sinks:
        with stages("window only") as stage, without_sinks(folder / MODEL) as path:
            window_only = evaluate_stream(Session(path), tokens, request.bucket, stage.advance)
    if checkpoint is not None:
        with stages("dense") as stage:
            model = reference_model(checkpoint)
            dense = evaluate_dense(model, tokens, bucket=request.bucket, advance=stage.advance)
    found = StreamComparison(request.text.name, stream, window_only, dense)
    write_report(replace(report, stream=found), folder)
    return found


def _stream_tokens(folder: Path, request: StreamRequest) -> Array:
    tokenizer, text = tokenizer_of(folder), read_text(request.text)
    length, count = (1, None) if request.tokens is None else (request.tokens, 1)
    return token_windows(tokenizer, text, length, count).reshape(-1)


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a build.

    Raises:
        RotexportError: it is no build, or has none.

    """
    read_manifest(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise RotexportError(f"'{folder}' has no tokenizer: its model came without one")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def revalidate(folder: Path, text: Path | None, model: str | None, stages: Stages) -> Proof:
    """Compare the graph of a build with its PyTorch model again; the result goes into `validation.json`.

    Args:
        folder: the build.
        text: what to take tokens from; the text of the build by default.
        model: where the PyTorch model is now; where it was at the build by default.
        stages: hears about progress.

    Raises:
        RotexportError: something is missing. Missed thresholds raise in `Proof.require`.

    """
    with stages("open"):
        manifest = read_manifest(folder)
        recipe = parse_recipe(str(manifest["recipe"]), str(folder / MARK))
        checkpoint = open_checkpoint(model or str(manifest["source"]))
        samples = Samples.of(checkpoint)
        if text is not None:
            samples = samples.proving_on(checkpoint, text)
        if recipe.attention.streaming:
            samples = samples.within(recipe.attention.reach)
    with stages("reference") as stage:
        reference = observe_reference(
            reference_model(checkpoint), samples.tokens, samples.windows, stage.advance
        )
    with stages("validate") as stage, tempfile.TemporaryDirectory(prefix="rotexport-") as scratch:
        path = runnable(load_model(folder / MODEL), folder / MODEL, Scratch(Path(scratch)))
        proof = prove(reference, path, recipe.thresholds, _view(folder, recipe), stage.advance)
    write_json(folder / "validation.json", {"text": samples.source, "proof": to_plain(proof)})
    return proof


def _view(folder: Path, recipe: Recipe) -> StreamView:
    report = read_report(folder)
    rotated = any(t.rotation == "r1" and t.where != Where.REFUSED.value for t in report.transforms)
    centered = any(p.name == CenterLayerNorms.name and p.changed for p in report.passes)
    rotation = recipe.rotations.r1
    if rotation.kind in ("learned", "file"):  # as it was folded, wherever it was read from
        rotation = Rotation("file", file=str(folder / ROTATIONS))
    return StreamView.after(rotation.transform(report.model.width) if rotated else None, centered)


def _open(model: str) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    if is_build(model):
        return open_graph(Path(model) / MODEL), tokenizer_of(Path(model))
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise RotexportError(f"'{model}' has no tokenizer to read a text with")
    return reference_model(checkpoint), tokenizer
