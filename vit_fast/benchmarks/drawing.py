"""Plots as SVG text, with nothing but this file: bars and lines that look right on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

INK, FAINT = "#7a818a", "#7a818a55"
OURS, OTHERS, FLOOR = "#d9480f", "#4c7eb8", "#2b8a3e"
COLOURS = ("#d9480f", "#4c7eb8", "#2b8a3e", "#9c5fb5", "#b58a00", "#0b8a8a", "#c2477f", "#6b6f76", "#8a5a2b", "#5f7f2b")
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


@dataclass(frozen=True)
class Bar:
    """A value with its spread, on a line of its own."""

    label: str
    value: float
    low: float
    high: float
    text: str  # beside it
    ours: bool = False
    floor: float | None = None  # a mark


def _svg(width: int, height: int, body: list[str], title: str) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
    )
    return (
        "\n".join([f'{head} aria-label="{escape(title)}" {FONT}>', f"<title>{escape(title)}</title>", *body, "</svg>"]) + "\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = INK, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">{escape(text)}</text>'


def ticks(most: float, count: int = 5) -> list[float]:
    """Round numbers from 0 up to ``most``."""
    if not most > 0:
        return [0.0]
    step = 10 ** math.floor(math.log10(most / count))
    step *= next(m for m in (1, 2, 5, 10) if most / (step * m) <= count)
    return [i * step for i in range(int(most / step + 1e-9) + 1)]


def bars(title: str, unit: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars: value, spread as a thin line, floor as a mark."""
    left, right, top, line = 8 + 6.6 * max(len(row.label) for row in rows), 560, 48, 22
    most = max(max(row.value, row.high) for row in rows)
    scale = (right - left) / most
    height = int(top + line * len(rows) + 10)
    body = [_text(8, 18, title, weight="bold"), _text(8, 36, unit)]
    for value in ticks(most):
        x = left + value * scale
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 8}" stroke="{FAINT}"/>')
        body.append(_text(x, top - 10, f"{value:g}", "middle"))
    for i, row in enumerate(rows):
        y = top + line * i
        fill = OURS if row.ours else OTHERS
        body.append(_text(left - 6, y + 13, row.label, "end", fill=OURS if row.ours else INK))
        body.append(f'<rect x="{left:.1f}" y="{y + 2}" width="{max(1.0, row.value * scale):.1f}" height="14" fill="{fill}"/>')
        a, b = left + row.low * scale, left + row.high * scale
        body.append(f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y + 9}" y2="{y + 9}" stroke="{INK}" stroke-width="2"/>')
        if row.floor is not None:
            x = left + row.floor * scale
            body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 18}" stroke="{FLOOR}" stroke-width="3"/>')
        body.append(_text(max(left + row.value * scale, b) + 6, y + 13, row.text))
    return _svg(720, height, body, title)


def lines(title: str, across: str, up: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """A line for each name through (x, y) points; x on a logarithmic axis of powers of two, y from 0."""
    left, right, top, bottom = 60, 520, 48, 330
    xs = sorted({x for points in series.values() for x, _ in points})
    most = max(y for points in series.values() for _, y in points)
    first, last = math.log2(xs[0]), math.log2(xs[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if last == first else (math.log2(x) - first) / (last - first)
        return left + (right - left) * across, bottom - (bottom - top) * y / most

    body = [_text(8, 18, title, weight="bold"), _text(8, 36, up), _text((left + right) / 2, bottom + 34, across, "middle")]
    for value in ticks(most):
        y = at(xs[0], value)[1]
        body.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>')
        body.append(_text(left - 6, y + 4, f"{value:,.0f}" if most >= 10 else f"{value:g}", "end"))
    body += [_text(at(x, 0)[0], bottom + 16, f"{x:g}", "middle") for x in xs]
    for i, (name, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        placed = [at(x, y) for x, y in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        body.append(_text(right + 14, top + 16 * i + 4, name, fill=colour))
    return _svg(720, max(bottom + 44, top + 16 * len(series) + 10), body, title)
