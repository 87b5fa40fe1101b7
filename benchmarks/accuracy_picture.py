"""Methods against each other as a picture: one line per rotation, one dot per method, perplexity across."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TypeAlias

Figures: TypeAlias = "Mapping[tuple[str, str], float]"  # of one scheme, by rotation and method

WIDTH, LEFT, RIGHT, ROW, HEAD = 760, 110, 24, 26, 56
TICKS = (22, 25, 30, 40, 50, 60, 80, 100, 120, 150, 200)
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .faint { fill: #59636e; font-size: 12px }
.head { font-weight: 600 } .shape { stroke: #fff }
line { stroke: #d1d9e0 } .float { stroke: #59636e; stroke-dasharray: 3 3 }
.m0 { fill: #818b98 } .m1 { fill: #b77d00 } .m2 { fill: #0969da } .m3 { fill: #bf3989 } .m4 { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .faint { fill: #9198a1 } line { stroke: #3d444d } .float { stroke: #9198a1 }
  .shape { stroke: #0d1117 }
  .m0 { fill: #9198a1 } .m1 { fill: #d29922 } .m2 { fill: #4493f8 }
  .m3 { fill: #db61a2 } .m4 { fill: #3fb950 }
}"""


def picture(schemes: Mapping[str, Figures], methods: Sequence[str], floor: float) -> str:
    """Return an SVG; `floor` is the float model's perplexity, a dashed line. The axis is logarithmic."""
    largest = max(value for figures in schemes.values() for value in figures.values())
    across = (WIDTH - LEFT - RIGHT) / math.log(largest * 1.03 / floor)

    def place(perplexity: float) -> float:
        return LEFT + across * math.log(perplexity / floor)

    parts = [_legend([method for figures in schemes.values() for _, method in figures], methods)]
    top = 40
    for scheme, figures in schemes.items():
        rotations = list(dict.fromkeys(rotation for rotation, _ in figures))
        first, bottom = top + HEAD, top + HEAD + ROW * (len(rotations) - 1)
        parts.append(f'<text x="12" y="{top + 22}" class="head">{escape(scheme)}</text>')
        parts += [
            _upright(place(tick), first, bottom, "", f"{tick:g}")
            for tick in TICKS
            if place(floor) + 30 < place(tick) <= WIDTH - RIGHT
        ]
        parts.append(_upright(place(floor), first, bottom, "float", f"float {floor:g}"))
        for row, rotation in enumerate(rotations):
            y = first + ROW * row
            parts.append(f'<text x="12" y="{y + 4}">{escape(rotation)}</text>')
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts += [
                f'<circle class="shape m{methods.index(method)}" cx="{place(value):.1f}" cy="{y}" r="6"/>'
                for (turned, method), value in figures.items()
                if turned == rotation
            ]
        top = bottom + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img" '
        f'aria-label="Perplexity by scheme, rotation and method">\n<style>{STYLE}\n</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _upright(x: float, first: float, bottom: float, style: str, text: str) -> str:
    line = f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{first - 14}" y2="{bottom + 14}"/>'
    return line + f'<text class="faint" x="{x:.1f}" y="{first - 20}" text-anchor="middle">{text}</text>'


def _legend(present: Sequence[str], methods: Sequence[str]) -> str:
    x, items = 18, []
    for style, method in enumerate(methods):
        if method in present:
            items.append(f'<circle class="shape m{style}" cx="{x}" cy="20" r="6"/>')
            items.append(f'<text x="{x + 12}" y="24">{escape(method)}</text>')
            x += 40 + 7 * len(method)
    return "".join(items)
