"""Line charts as inline SVG: no script and no library is needed to see them, and the page's colours apply.

Why not a plotting library: the page must be one small file that follows the reader's light or dark theme and scales to a
phone; SVG with `currentColor` and CSS variables does both in a few kilobytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40


@dataclass(frozen=True)
class Line:
    """A named series of (x, y); `colour` is a number into the page's palette."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int


def choose_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two bounds.

    Examples:
        >>> choose_ticks(0, 10)
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    span = high - low or abs(high) or 1.0
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
    first = math.ceil(low / step - 1e-9)
    digits = 2 - math.floor(math.log10(step))
    return [round(i * step, digits) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_lines(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """An <svg> with axes, one path a line and a title on each; empty when there is nothing finite to draw."""
    points = [p for line in lines for p in line.points if all(map(math.isfinite, p))]
    if not points:
        return ""
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_low, y_high = min(p[1] for p in points), max(p[1] for p in points)
    x_span, y_span = x_high - x_low or 1.0, y_high - y_low or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - (y - y_low) / y_span * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for tick in choose_ticks(x_low, x_high):
        x, _ = place(tick, y_low)
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in choose_ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for line in lines:
        places = [place(*p) for p in line.points if all(map(math.isfinite, p))]
        if not places:
            continue
        path = "M" + " L".join(f"{x} {y}" for x, y in (places if len(places) > 1 else 2 * places))
        parts.append(f'<path class="line c{line.colour}" d="{path}"><title>{escape(line.name)}</title></path>')
    middle, centre = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(13 {centre}) rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">{escape(y_label)}</text>')
    return "".join([*parts, "</svg>"])


def draw_bars(values: Sequence[tuple[str, float, str, int]]) -> str:
    """Horizontal bars: (name, length, text at the end, colour)."""
    longest = max((v for _, v, _, _ in values), default=0.0) or 1.0
    row, left, right = 30, 130, 90
    height = row * len(values) + 6
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img">']
    for i, (name, value, text, colour) in enumerate(values):
        y, length = 4 + i * row, value / longest * (WIDTH - left - right)
        parts.append(f'<text class="label" x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="bar c{colour}" x="{left}" y="{y + 2}" width="{length:.1f}" height="{row - 10}" rx="2"/>'
        )
        parts.append(f'<text class="tick" x="{left + length + 6:.1f}" y="{y + 16}">{escape(text)}</text>')
    return "".join([*parts, "</svg>"])
