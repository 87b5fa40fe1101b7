"""Charts as SVG text, styled by the page's CSS classes so that they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 36
ROW = 26


@dataclass(frozen=True)
class Series:
    """A named line through (x, y) points; `style` is a CSS class of the page (`before`, `after`, `faint`)."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axes:
    """Labels and scale of a line chart; `floor` is a y value that must be visible, drawn as a dashed line."""

    x_label: str
    y_label: str
    log_y: bool = False
    floor: float | None = None


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart; `text` stands beside the bar."""

    label: str
    value: float
    text: str


def line_chart(series: Sequence[Series], axes: Axes, width: int = 720, height: int = 260) -> str:
    """Draw lines over a common x axis; every point tells its values when pointed at."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points] + ([] if axes.floor is None else [axes.floor])
    x_scale = _Scale(min(xs), max(xs), LEFT, width - RIGHT, False)
    y_ticks = _log_ticks(min(ys), max(ys)) if axes.log_y else _ticks(min(ys), max(ys))
    y_scale = _Scale(y_ticks[0], y_ticks[-1], height - BOTTOM, TOP, axes.log_y)
    parts = [_grid(y_ticks, y_scale, width)]
    parts += [
        _text(x_scale(x), height - BOTTOM + 16, _number(x), "middle") for x in _whole_ticks(min(xs), max(xs))
    ]
    parts.append(_text((LEFT + width - RIGHT) / 2, height - 4, axes.x_label, "middle", "label"))
    if axes.floor is not None:
        y = y_scale(axes.floor)
        parts.append(f'<line class="floor" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts += [_line(line, x_scale, y_scale, axes) for line in series]
    return _svg(width, height, f"{axes.y_label} by {axes.x_label}", parts)


def legend(series: Sequence[Series]) -> str:
    """Return the legend of a line chart as HTML."""
    items = (f'<span class="key {line.style}"></span>{escape(line.label)}' for line in series)
    return f'<p class="legend">{" ".join(f"<span>{item}</span>" for item in items)}</p>'


def bar_chart(bars: Sequence[Bar], width: int = 720) -> str:
    """Draw horizontal bars from zero, one per row."""
    label_width = 12 + 7.2 * max(len(bar.label) for bar in bars)
    text_width = 16 + 6.8 * max(len(bar.text) for bar in bars)
    room = width - label_width - text_width
    largest = max(bar.value for bar in bars) or 1.0
    parts = []
    for row, bar in enumerate(bars):
        top, length = row * ROW + 4, max(1.0, bar.value / largest * room)
        parts.append(_text(label_width - 8, top + 13, bar.label, "end"))
        parts.append(
            f'<rect class="bar" x="{label_width}" y="{top}" width="{length:.1f}" height="18" rx="2"/>'
        )
        parts.append(_text(label_width + length + 8, top + 13, bar.text, "start", "label"))
    return _svg(width, len(bars) * ROW + 4, ", ".join(f"{bar.label}: {bar.text}" for bar in bars), parts)


class _Scale:
    """Maps a value range to pixels."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool) -> None:
        self._log = log
        self._low, high = self._position(low), self._position(high)
        self._start = start
        self._per_unit = (stop - start) / ((high - self._low) or 1.0)

    def __call__(self, value: float) -> float:
        return self._start + (self._position(value) - self._low) * self._per_unit

    def _position(self, value: float) -> float:
        return math.log10(value) if self._log else value


def _line(line: Series, x_scale: _Scale, y_scale: _Scale, axes: Axes) -> str:
    places = [(x_scale(x), y_scale(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5"><title>{escape(axes.x_label)} {_number(x)}, '
        f"{escape(line.label)}: {_number(y)}</title></circle>"
        for (px, py), (x, y) in zip(places, line.points, strict=True)
    )
    return f'<g class="{line.style}"><polyline points="{path}"/>{dots}</g>'


def _grid(ticks: Sequence[float], scale: _Scale, width: int) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{scale(tick):.1f}" y2="{scale(tick):.1f}"/>'
        + _text(LEFT - 6, scale(tick) + 4, _number(tick), "end")
        for tick in ticks
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that enclose the range."""
    magnitude = max(abs(low), abs(high), 1.0)
    step = _round_step((high - low if high - low > 1e-9 * magnitude else magnitude) / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * index for index in range(first, max(last, first + 1) + 1)]


def _whole_ticks(low: float, high: float) -> list[float]:
    step = max(1, round(_round_step((high - low) / 8 or 1.0)))
    return [float(x) for x in range(math.ceil(low), math.floor(high) + 1) if (x - math.ceil(low)) % step == 0]


def _round_step(least: float) -> float:
    power: float = 10 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 (or powers of ten, when there would be many) that enclose a positive range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    lower = [tick for tick in ticks if tick <= low * 1.001]
    upper = [tick for tick in ticks if tick >= high * 0.999]
    return [tick for tick in ticks if lower[-1] <= tick <= max(upper[0], 2 * lower[-1])]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg>'
    )
