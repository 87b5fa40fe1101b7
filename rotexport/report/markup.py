"""Numbers in words and rows in tables: what the pages of a report are put together from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from rotexport.metrics import EQUAL_DB

_NUMBER = re.compile(r"^(-?[\d,]+(\.\d+)?(e[+-]?\d+)?( ?(%|dB|kB|MB|GB|B|s|min))?|equal)$")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; columns whose cells are all numbers are aligned to the right."""
    numeric = [
        all(_NUMBER.match(cell) for cell in column if cell) and any(column)
        for column in zip(*rows, strict=True)
    ]
    head = "".join(_cell("th", text, right) for text, right in zip(header, numeric, strict=True))
    body = "".join(
        f"<tr>{''.join(_cell('td', text, right) for text, right in zip(row, numeric, strict=True))}</tr>"
        for row in rows
    )
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>\n"


def _cell(tag: str, text: str, right: bool) -> str:
    return f"<{tag}{' class=number' if right else ''}>{escape(text)}</{tag}>"


def figure(value: float | None) -> str:
    """Return a number with about four digits; nothing for None, a dash where there is no number."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2e}"


def decibels(value: float) -> str:
    """Return a ratio in decibels, in words where there was no error."""
    return "equal" if value >= EQUAL_DB else f"{value:.1f} dB"


def size(count: float) -> str:
    """Return a number of bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{0 if count >= 100 * factor else 1}f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Return a time."""
    if seconds < 600:
        return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def count(number: int, noun: str) -> str:
    """Return a number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def parameters(number: int) -> str:
    """Return a number of parameters."""
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def some(items: Sequence[str], shown: int = 3) -> str:
    """Return the first few of many, and how many more there are."""
    more = f"; and {len(items) - shown} more" if len(items) > shown else ""
    return "; ".join(items[:shown]) + more
