"""The section of a report on weights that were chosen block by block."""

from __future__ import annotations

from collections.abc import Sequence

from rotexport.report.charts import Axes, Series, legend, line_chart
from rotexport.report.data import BlockSummary
from rotexport.report.markup import figure, table

STYLES = ("before", "faint", "after")


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
