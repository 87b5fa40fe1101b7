"""The page of a build report: one HTML file without external resources, for who did not run the build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib import resources

from rotexport.report import sections
from rotexport.report.data import BuildReport, TransformSummary
from rotexport.report.markup import count, duration, figure, parameters, size
from rotexport.report.weights import clips, sensitivity, steps, weights
from rotexport.validate import Proof


def render(report: BuildReport) -> str:
    """Return the page."""
    parts = (
        _head(report),
        _tiles(report),
        _in_short(report),
        sections.fidelity(report),
        sections.stream(report.stream),
        sections.outliers(report.outliers),
        sections.rotations(report),
        steps(report.steps),
        weights(report.weights),
        clips(report.clips),
        sensitivity(report.sensitivities),
        sections.passes(report),
        sections.engines(report),
        sections.cost(report),
        sections.reproduce(report),
    )
    style = (resources.files("rotexport.report") / "report.css").read_text(encoding="utf-8")
    title = escape(f"{report.model.name}, {report.recipe}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{''.join(parts)}</body>\n</html>\n"
    )


def _head(report: BuildReport) -> str:
    gpus = f" for {', '.join(report.gpus)}" if report.gpus else ""
    under = f"Recipe {report.recipe}, target {report.target}{gpus}"
    created = report.created.replace("T", " ").replace("+00:00", " UTC")
    created = f" · {created}" if created else ""
    return (
        f"<h1>{escape(report.model.name)}</h1>\n<p class='under'>{escape(under + created)}</p>\n"
        + _verdict(report.proof)
    )


def _verdict(proof: Proof | None) -> str:
    if proof is None:
        return (
            "<div class='verdict'><b>Not validated.</b> "
            "This build was made without comparing it with the PyTorch model.</div>\n"
        )
    if not proof.thresholds:
        return (
            "<div class='verdict'><b>Measured.</b> The recipe sets no thresholds; figures are below.</div>\n"
        )
    missed = [result for result in proof.thresholds if not result.passed]
    if not missed:
        return (
            f"<div class='verdict good'><b>Passed.</b> {count(len(proof.thresholds), 'threshold')} "
            "against the PyTorch model, all met.</div>\n"
        )
    block = proof.first_diverged_block
    where = "" if block is None else f"The first block that no longer follows PyTorch is block {block}."
    thresholds = count(len(proof.thresholds), "threshold")
    lines = (f"{r.title}: {figure(r.value)}, {r.bound} {figure(r.limit)} asked" for r in missed)
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f"<div class='verdict bad'><b>Failed.</b> {len(missed)} of {thresholds} missed. {where}"
        f"<ul>{items}</ul></div>\n"
    )


def _tiles(report: BuildReport) -> str:
    tiles = []
    proof = report.proof
    if proof is not None:
        if proof.evaluation is not None and proof.reference_evaluation is not None:
            before, after = proof.reference_evaluation.perplexity, proof.evaluation.perplexity
            tiles.append(
                (figure(after), f"perplexity (PyTorch: {figure(before)}, {after / before - 1:+.1%})")
            )
        tiles.append(
            (f"{proof.comparison.top1_agreement:.1%}", "of tokens have the same most likely successor")
        )
        tiles.append((figure(proof.comparison.kl), "nats of divergence per token (KL)"))
    if report.engines:
        largest = max(report.engines, key=lambda engine: engine.size)
        tiles.append((size(largest.size), "engine" if len(report.engines) == 1 else "largest engine"))
    model = sum(length for name, length in report.files.items() if name.startswith("model.onnx"))
    if model:
        tiles.append((size(model), "ONNX model with weights"))
    if report.stages:
        peaks = [
            stage.peak_anonymous_bytes for stage in report.stages if stage.peak_anonymous_bytes is not None
        ]
        memory = f", at most {size(max(peaks))} of memory" if peaks else ""
        tiles.append((duration(sum(stage.seconds for stage in report.stages)), f"to build{memory}"))
    cells = (
        f"<div class='tile'><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small in tiles
    )
    return f"<div class='tiles'>{''.join(cells)}</div>\n"


def _in_short(report: BuildReport) -> str:
    model = report.model
    sentences = [
        f"{model.name} ({model.architecture}, {parameters(model.parameters)} parameters, {model.blocks} "
        f"blocks of width {model.width}, vocabulary {model.vocabulary:,}) was exported from {model.source}.",
        f"Recipe {report.recipe}: {report.description}" if report.description else "",
        _transforms_in_words(report.transforms),
        _cache_in_words(report),
        _engines_in_words(report),
        _proof_in_words(report),
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    listed = f"<h3>Notes</h3><ul>{notes}</ul>" if notes else ""
    return f"<h2>What was done</h2>\n<p>{escape(' '.join(filter(None, sentences)))}</p>\n{listed}"


def _transforms_in_words(transforms: Sequence[TransformSummary]) -> str:
    if not transforms:
        return "Nothing was rotated."
    counts = Counter(transform.where for transform in transforms)
    refused = f" {counts['refused']} could not be placed." if counts["refused"] else ""
    return (
        f"Of {count(len(transforms), 'rotation')}, {counts['folded']} went into the weights, where they cost "
        f"nothing at run time, and {counts['online']} online into the graph.{refused}"
    )


def _cache_in_words(report: BuildReport) -> str:
    if report.cache_bytes:
        return f"The key/value cache takes {size(report.cache_bytes)} per row, however long the stream."
    per_token = report.cache_bytes_per_token
    return "" if per_token is None else f"The key/value cache takes {size(per_token)} per token."


def _engines_in_words(report: BuildReport) -> str:
    if not report.engines:
        return ""
    return f"Engines: {len(report.engines)}, each product's kernel read back from the builder."


def _proof_in_words(report: BuildReport) -> str:
    if report.proof is None:
        return ""
    text = f" ({report.text})" if report.text else ""
    tokens = f"{report.proof.comparison.tokens} tokens{text}"
    words = f"The result ran in ONNX Runtime against PyTorch in float32 over {tokens}"
    evaluation = report.proof.evaluation
    if evaluation is not None:
        words += f"; perplexity is over {evaluation.windows} windows of {evaluation.length} tokens"
    return words + "."
