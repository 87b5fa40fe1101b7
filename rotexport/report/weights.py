"""The section of a report on weights that were chosen block by block."""

from __future__ import annotations

from collections.abc import Sequence

from rotexport.report.charts import Axes, Series, legend, line_chart
from rotexport.report.data import BlockSummary, ClipSummary, SiteSensitivity, StepSummary
from rotexport.report.markup import figure, table

STYLES = ("before", "faint", "after")
SHOWN = 10


def weights(blocks: Sequence[BlockSummary]) -> str:
    """Errors that quantized weights leave in their products, before and after each step."""
    if not blocks:
        return ""
    names = [step for block in blocks for losses in block.losses.values() for step in losses]
    steps = list(dict.fromkeys(names))
    lines = [
        Series(step, STYLES[min(place, len(STYLES) - 1)], _means(blocks, step))
        for place, step in enumerate(steps)
    ]
    rows = [
        [site, *(figure(losses.get(step)) for step in steps), figure(block.error)]
        for block in blocks
        for site, losses in block.losses.items()
    ]
    chart = f"{legend(lines)}\n{line_chart(lines, Axes('block', 'error', log_y=True))}\n" if lines else ""
    return (
        "<h2>Weights</h2>\n"
        "<p>What quantized weights leave as error in each product, after each step: its power over the "
        "product's, on the calibration text; a block's mean. The last column below is the error of the "
        f"block's output, of all blocks up to it, as an amplitude.</p>\n{chart}"
        f"<details><summary>Figures</summary>{table(['Site', *steps, 'Block output'], rows)}</details>\n"
    )


def _means(blocks: Sequence[BlockSummary], step: str) -> list[tuple[float, float]]:
    found = {
        block.block: [losses[step] for losses in block.losses.values() if step in losses] for block in blocks
    }
    return [(number, sum(values) / len(values)) for number, values in found.items() if values]


def steps(found: Sequence[StepSummary]) -> str:
    """Each block's error after each step of the build."""
    if not found:
        return ""
    lines = [
        Series(step.step, STYLES[0] if place == 0 else STYLES[1], list(enumerate(step.blocks)))
        for place, step in enumerate(found[:-1])
    ]
    lines.append(Series(found[-1].step, STYLES[2], list(enumerate(found[-1].blocks))))
    rows = [
        [str(block), *(figure(step.blocks[block]) for step in found)] for block in range(len(found[0].blocks))
    ]
    rows.append(["mean", *(figure(sum(step.blocks) / len(step.blocks)) for step in found)])
    return (
        "<h2>Step by step</h2>\n<p>Each block quantized alone, on what the float model gives it: the power "
        "of the error in its output over the output's, a mean over tokens of the calibration text, after "
        "each step of the build. Until weights are chosen they are rounded to nearest.</p>\n"
        f"{legend(lines)}\n{line_chart(lines, Axes('block', 'error', log_y=True))}\n"
        f"<details><summary>Figures</summary>{table(['Block', *(s.step for s in found)], rows)}</details>\n"
    )


def clips(found: Sequence[ClipSummary]) -> str:
    """The clip of every input, and what it gained."""
    if not found:
        return ""
    when = {1: "before weights", 2: "behind weights"}
    rows = [
        [choice.sites, when.get(choice.search, ""), *map(figure, (choice.clip, choice.before, choice.after))]
        for choice in found
    ]
    return (
        "<h2>Clips</h2>\n<p>How much of its range each quantized input keeps, and the error of the products "
        "that read it: its power over theirs, a mean over tokens, as it was and with the clip.</p>\n"
        f"<details><summary>{len(rows)} choices</summary>"
        f"{table(['Sites', 'searched', 'clip', 'error before', 'after'], rows)}</details>\n"
    )


def sensitivity(sites: Sequence[SiteSensitivity]) -> str:
    """What each site alone costs its block, the worst first."""
    if not sites:
        return ""
    worst = sorted(sites, key=lambda found: found.narrow, reverse=True)
    rows = [
        [found.site, figure(found.narrow), figure(found.wide), "wider" if found.kept_wide else ""]
        for found in worst
    ]
    header = ["Site", "Error", "With a wider weight", "Kept"]
    return (
        "<h2>Sensitivity</h2>\n<p>Each site quantized alone, rounded to nearest: the power of the error in "
        "its block's output over the output's, a mean over tokens. The worst come first.</p>\n"
        f"{table(header, rows[:SHOWN])}<details><summary>All sites</summary>{table(header, rows)}</details>\n"
    )
