"""Line charts as SVG, in the colours of the page that they stand in."""

import math
import zlib
from collections.abc import Sequence
from html import escape
from typing import NamedTuple


# The drawing's own units; a page shows it 350 to 600 pixels wide, so that its letters are of readable size.
WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 36
COLOURS = 8
# Before this share of a run values may lie outside: the loss of a new model would press the rest flat.
SETTLED = 0.05


class Line(NamedTuple):
    """Points of one curve: the number of its colour, and whether it is dashed."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False


def line_chart(title: str, lines: Sequence[Line], from_zero: bool = False) -> str:
    """
    A figure of curves over the optimizer steps.

    Args:
        title (`str`): what is drawn, with its unit.
        lines (`Sequence[Line]`): the curves; those without points are left out.
        from_zero (`bool`, *optional*, defaults to `False`): whether the axis begins at 0.

    Returns:
        `str`: an HTML figure, empty without points.
    """
    lines = [line._replace(points=[p for p in line.points if math.isfinite(p[1])]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    steps = [step for line in lines for step, _ in line.points]
    begin, end = min(0, *steps), max(*steps, 1)
    settled = [value for line in lines for value in _settled(line, begin)]
    low, high = min(settled), max(settled)
    low = 0.0 if from_zero else low
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    low, high = (low if from_zero else low - margin), high + margin

    def x(step: float) -> float:
        return LEFT + (step - begin) / (end - begin) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for value in ticks(low, high, 5):
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for step in ticks(begin, end, 4):
        drawn.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(step)}</text>')
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">optimizer steps</text>')
    inside = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    name = f"clip-{zlib.crc32(title.encode())}"
    drawn.append(f'<clipPath id="{name}"><rect {inside}/></clipPath><g clip-path="url(#{name})">')
    for line in lines:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thinned(line.points))
        style = f'class="line c{line.colour % COLOURS}{" dashed" if line.dashed else ""}"'
        drawn.append(f'<polyline {style} points="{path}"/>')
        if len(line.points) == 1:
            step, value = line.points[0]
            drawn.append(
                f'<circle class="dot c{line.colour % COLOURS}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="4"/>'
            )
    drawn.append("</g>")
    legend = "".join(
        f'<span class="key"><i class="c{line.colour % COLOURS}{" dashed" if line.dashed else ""}"></i>'
        f"{escape(line.label)}</span>"
        for line in lines
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    return f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{legend}</figcaption></figure>"


def _settled(line: Line, begin: float) -> list[float]:
    """Values past a run's own first steps, so that a short run beside a long one stays in sight."""
    last = max(step for step, _ in line.points)
    return [value for step, value in line.points if step >= begin + SETTLED * (last - begin)]


def thinned(points: Sequence[tuple[float, float]], most: int = 500) -> Sequence[tuple[float, float]]:
    """At most about so many of the points, the last one among them."""
    stride = max(1, len(points) // most)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two, about so many."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    size = next(size for size in (unit, 2 * unit, 5 * unit, 10 * unit) if size >= raw * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [place * size for place in range(first, math.floor(high / size + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label, short."""
    if abs(value) < 1e-12:
        return "0"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1000 if letter == 'k' else limit):g}{letter}"
    return f"{value:.4g}"
