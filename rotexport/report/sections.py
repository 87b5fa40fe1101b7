"""The evidence on a report page: figures, charts and tables, each empty when there is nothing to show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from rotexport.metrics import Comparison
from rotexport.report.charts import Axes, Bar, Series, bar_chart, legend, line_chart
from rotexport.report.data import BuildReport, KernelCount, PassSummary, SiteOutliers, TransformSummary
from rotexport.report.markup import decibels, duration, figure, size, some, table
from rotexport.streaming.evaluate import StreamComparison
from rotexport.validate import DIVERGED_DB, Proof

ROTATIONS = {
    "r1": "R1, the residual stream",
    "r2": "R2, values and attention outputs, per head",
    "r3": "R3, queries and keys after their positions",
    "r4": "R4, inputs of down projections",
    "o_heads": "inputs of output projections, across heads",
    "affine": "learned affine transforms",
}


def fidelity(report: BuildReport) -> str:
    """The figures against PyTorch, at the logits and block by block."""
    proof = report.proof
    if proof is None:
        return ""
    runs = [("one call", proof.comparison)] + ([("on a cache", proof.cached)] if proof.cached else [])
    header = ["Logits", *(name for name, _ in runs)]
    rows = [
        ["largest error", *(figure(run.max_abs_error) for _, run in runs)],
        ["largest logit", *(figure(run.logit_scale) for _, run in runs)],
        ["signal over error", *(decibels(run.sqnr_db) for _, run in runs)],
        ["cosine", *(f"{run.cosine:.6f}" for _, run in runs)],
        ["KL divergence, nats per token", *(figure(run.kl) for _, run in runs)],
        ["same most likely token", *(f"{run.top1_agreement:.2%}" for _, run in runs)],
    ]
    parts = ["<h2>Against PyTorch</h2>\n", table(header, rows)]
    if proof.cached is not None:
        parts.append(
            "<p class='under'>The second column runs the last tokens in a call of their own, on the cache "
            "of keys and values that the first call left.</p>\n"
        )
    if proof.thresholds:
        parts += ["<h3>Thresholds</h3>\n", _thresholds(proof)]
    if proof.blocks:
        parts += ["<h3>Block by block</h3>\n", _blocks(proof)]
    return "".join(parts)


def _thresholds(proof: Proof) -> str:
    rows = "".join(
        f"<tr><td>{escape(result.title)}</td><td class='number'>{figure(result.value)}</td>"
        f"<td class='number'>{escape(result.bound)} {figure(result.limit)}</td>"
        f"<td class='{'good' if result.passed else 'bad'}'>{'met' if result.passed else 'missed'}</td></tr>"
        for result in proof.thresholds
    )
    head = "<tr><th>Figure</th><th class='number'>found</th><th class='number'>asked</th><th></th></tr>"
    return f"<div class='scroll'><table>{head}{rows}</table></div>\n"


def _blocks(proof: Proof) -> str:
    median = Series("median token", "after", [(error.block, error.sqnr_db) for error in proof.blocks])
    worst = Series("worst token", "faint", [(error.block, error.worst_token_db) for error in proof.blocks])
    low = min(y for _, y in [*median.points, *worst.points])
    axes = Axes("block", "dB", floor=DIVERGED_DB if low < 4 * DIVERGED_DB else None)
    drawn = (
        f" Below the dashed line ({DIVERGED_DB:.0f} dB) a block no longer follows PyTorch."
        if axes.floor
        else ""
    )
    return (
        "<p>Each block's output against PyTorch's: the power of the signal over that of the error, in "
        f"decibels. 20 dB is an error of a tenth, 40 dB of a hundredth.{drawn}</p>\n"
        f"{legend([median, worst])}\n{line_chart([median, worst], axes)}\n"
    )


def stream(found: StreamComparison | None) -> str:
    """Perplexity along one long stream, beside a dense model's and one without sinks."""
    if found is None:
        return ""
    ways = [
        ("sinks and window" if found.window_only else "window", "after", found.stream),
        ("window only", "before", found.window_only),
        ("dense", "faint", found.dense),
    ]
    shown = [(name, style, way) for name, style, way in ways if way is not None]
    lines = [
        Series(name, style, [(bucket.stop - 1, bucket.perplexity) for bucket in way.buckets])
        for name, style, way in shown
    ]
    rows = [
        [
            f"{bucket.start:,} to {bucket.stop - 1:,}",
            *(figure(way.buckets[i].perplexity) for _, _, way in shown),
        ]
        for i, bucket in enumerate(found.stream.buckets)
    ]
    rows.append(["all", *(figure(way.perplexity) for _, _, way in shown)])
    dense = " The dense model reads the last tokens anew for every few it predicts." if found.dense else ""
    memory = size(found.stream.cache_bytes) if found.stream.cache_bytes else ""
    return (
        "<h2>Along a stream</h2>\n"
        f"<p>{found.stream.tokens:,} tokens of {escape(found.text)}, read as one stream with a cache that "
        f"stays at {memory}: perplexity by position.{dense}</p>\n"
        f"{legend(lines)}\n{line_chart(lines, Axes('position', 'perplexity', log_y=True))}\n"
        f"<details><summary>Figures</summary>{table(['Tokens', *(name for name, _, _ in shown)], rows)}"
        "</details>\n"
    )


def outliers(outliers: Sequence[SiteOutliers]) -> str:
    """How uneven the inputs of linears are, before and after rotation."""
    if not outliers:
        return ""
    rotated = any(site.ratio_after is not None for site in outliers)
    panels = [
        f"<div><h3>{escape(role)}</h3>{_panel(sites)}</div>"
        for role, sites in _by_role(outliers).items()
        if len(sites) > 1
    ]
    key = [Series("before rotation" if rotated else "as exported", "before", [])]
    key += [Series("after rotation", "after", [])] if rotated else []
    return (
        "<h2>Outliers</h2>\n<p>What enters each linear layer. The ratio compares the largest channel with "
        "the median channel: at 1 all channels are alike, and few bits describe them well; a channel a "
        "hundred times larger than the others takes the whole range for itself.</p>\n"
        f"{legend(key)}\n<div class='panels'>{''.join(panels)}</div>\n{_worst_sites(outliers)}"
    )


def _panel(sites: Sequence[tuple[int, SiteOutliers]]) -> str:
    before = Series("before", "before", [(block, max(site.ratio_before, 1.0)) for block, site in sites])
    after = [(block, max(site.ratio_after, 1.0)) for block, site in sites if site.ratio_after is not None]
    series = [before, Series("after", "after", after)] if after else [before]
    return line_chart(series, Axes("block", "ratio", log_y=True), width=440, height=210)


def _by_role(outliers: Sequence[SiteOutliers]) -> dict[str, list[tuple[int, SiteOutliers]]]:
    """Group `block.role` sites by role; roles that read one tensor have equal figures and share a panel."""
    roles: dict[str, list[tuple[int, SiteOutliers]]] = {}
    for site in outliers:
        block, _, role = site.site.partition(".")
        drawable = all(r is None or math.isfinite(r) for r in (site.ratio_before, site.ratio_after))
        if block.isdigit() and drawable:
            roles.setdefault(role, []).append((int(block), site))
    merged: dict[tuple[tuple[int, float, float | None], ...], list[str]] = {}
    for role, sites in roles.items():
        figures = tuple((block, site.ratio_before, site.ratio_after) for block, site in sites)
        merged.setdefault(figures, []).append(role)
    return {", ".join(names): roles[names[0]] for names in merged.values()}


def _worst_sites(outliers: Sequence[SiteOutliers]) -> str:
    worst = sorted(outliers, key=lambda site: site.ratio_before, reverse=True)
    header = ["Site", "ratio before", "after", "kurtosis before", "after"]
    rows = [
        [
            site.site,
            figure(site.ratio_before),
            figure(site.ratio_after),
            figure(site.kurtosis_before),
            figure(site.kurtosis_after),
        ]
        for site in worst
    ]
    return (
        f"<details><summary>All {len(rows)} sites, worst first (a normal distribution has kurtosis 3)"
        "</summary>"
        f"{table(header, rows)}</details>\n"
    )


def rotations(report: BuildReport) -> str:
    """Where transforms went, and what the basis analysis found."""
    if not report.components and not report.transforms:
        return ""
    parts = ["<h2>Rotations</h2>\n"]
    if report.transforms:
        rows = [
            [ROTATIONS.get(kind, kind), where, transform, str(sites), reason]
            for (kind, where, transform, reason), sites in _alike(report.transforms)
        ]
        parts.append(table(["What", "how", "transform", "sites", "why"], rows))
    if report.components:
        rows = [
            [
                component.title,
                str(component.size),
                str(component.tensors),
                some(component.pins) if component.pins else "free",
            ]
            for component in report.components
        ]
        parts.append(
            "<details><summary>Basis components: activations that must share one basis, and what pins them"
            f"</summary>{table(['Component', 'size', 'tensors', 'pinned by'], rows)}</details>\n"
        )
    return "".join(parts)


def _alike(transforms: Iterable[TransformSummary]) -> Iterable[tuple[tuple[str, str, str, str], int]]:
    return Counter((t.rotation, t.where, t.transform, t.reason) for t in transforms).items()


def passes(report: BuildReport) -> str:
    """What each pass did to the logits."""
    if not report.passes:
        return ""
    rows = []
    for item in report.passes:
        rows.append(
            [
                item.name,
                item.preserves,
                str(item.changed),
                *_pass_figures(item.comparison),
                some(_pass_notes(item)),
            ]
        )
    return (
        "<h2>Passes</h2>\n<p>Each rewrite of the graph, with the logits after it compared with those before "
        "it: an error belongs to the pass in whose row it stands.</p>\n"
        + table(
            ["Pass", "leaves the model", "rewrites", "largest error", "of largest logit", "SQNR", "notes"],
            rows,
        )
    )


def _pass_notes(item: PassSummary) -> tuple[str, ...]:
    if item.comparison is not None:
        return item.notes
    return ("nothing to change" if item.changed == 0 else "not compared", *item.notes)


def _pass_figures(found: Comparison | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    return [figure(found.max_abs_error), figure(found.relative_error), decibels(found.sqnr_db)]


def engines(report: BuildReport) -> str:
    """The engine files, and the kernel of each matrix product."""
    if not report.engines:
        return ""
    files = [
        [engine.file, engine.target, engine.gpu, size(engine.size), duration(engine.seconds)]
        for engine in report.engines
    ]
    parts = [
        "<h2>Engines</h2>\n",
        table(["File", "target", "GPU", "size", "built in"], files),
    ]
    roles = list(dict.fromkeys(kernel.role for engine in report.engines for kernel in engine.kernels))
    if roles:
        rows = [[role, *(_kernels_of(role, engine.kernels) for engine in report.engines)] for role in roles]
        parts += [
            "<h3>What each matrix product became</h3>\n",
            table(["Product", *(engine.gpu for engine in report.engines)], rows),
        ]
    bodies = report.engines[0].bodies  # asked of the library, not of a GPU
    if bodies:
        rows = [[body.operator, body.reason, ", ".join(body.nodes)] for body in bodies]
        parts += [
            "<h3>Operators without a kernel</h3>\n<p>They run as their bodies of standard operators.</p>\n",
            table(["Operator", "why", "nodes"], rows),
        ]
    return "".join(parts)


def _kernels_of(role: str, kernels: Sequence[KernelCount]) -> str:
    return ", ".join(f"{item.count} × {item.kernel}" for item in kernels if item.role == role)


def cost(report: BuildReport) -> str:
    """Time and memory by stage."""
    if not report.stages:
        return ""
    bars = [
        Bar(
            stage.name,
            stage.seconds,
            duration(stage.seconds)
            + ("" if stage.peak_anonymous_bytes is None else f", {size(stage.peak_anonymous_bytes)}"),
        )
        for stage in report.stages
    ]
    return (
        "<h2>Time and memory of the build</h2>\n"
        "<p>Each stage with its time and its peak of anonymous memory (mapped files do not count).</p>\n"
        f"{bar_chart(bars)}\n"
    )


def reproduce(report: BuildReport) -> str:
    """What it takes to make this build again."""
    parts = ["<h2>To repeat it</h2>\n"]
    if report.command:
        parts.append(f"<pre>{escape(report.command)}</pre>\n")
    parts.append(f"<h3>Recipe</h3>\n<pre>{escape(report.recipe_text.strip())}</pre>\n")
    if report.files:
        rows = [[name, size(length)] for name, length in report.files.items()]
        parts += ["<h3>Files written</h3>\n", table(["File", "size"], rows)]
    if report.versions:
        rows = [[name, version] for name, version in report.versions.items()]
        parts += ["<h3>Versions</h3>\n", table(["Package", "version"], rows)]
    if report.inputs:
        rows = [[name, digest] for name, digest in report.inputs.items()]
        parts += ["<h3>Inputs</h3>\n", table(["File", "SHA-256"], rows)]
    return "".join(parts)
