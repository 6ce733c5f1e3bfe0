"""Heat maps of layers over steps: a small picture of one pixel a number, scaled up, with names beside it."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape


WIDTH, NAMES, RIGHT = 420, 130, 10
ROW, LEAST_ROW, TALLEST = 13, 4, 640
LETTERS = 22
MOST_COLUMNS = 240
# Dark blue to yellow: in the order of brightness, on a light page and on a dark one, and for the colour-blind.
STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def heatmap(title: str, steps: Sequence[int], rows: dict[str, Sequence[float | None]]) -> str:
    """
    A figure with a line of colours for each layer.

    Args:
        title (`str`): what the colours are.
        steps (`Sequence[int]`): of the columns.
        rows (`dict[str, Sequence[float or None]]`): by layer a number for each step; `None` leaves the place empty.

    Returns:
        `str`: an HTML figure, empty without numbers.
    """
    known = [value for row in rows.values() for value in row if value is not None and math.isfinite(value)]
    if not known:
        return ""
    stride = math.ceil(len(steps) / MOST_COLUMNS)
    low, high = min(known), max(known)
    if f"{low:.3g}" == f"{high:.3g}":  # sets of whole numbers of weights: what differs is rounding
        low = high
    pixels = [[_level(value, low, high) for value in row[::stride]] for row in rows.values()]
    height = max(LEAST_ROW, min(ROW, TALLEST / len(rows)))
    bottom = height * len(rows)
    every = math.ceil(ROW / height)
    drawn = [
        f'<image class="pixels" x="{NAMES}" y="0" width="{WIDTH - NAMES - RIGHT}" height="{bottom:.1f}" '
        f'preserveAspectRatio="none" href="{png(pixels)}"/>'
    ]
    for place, name in enumerate(shortened(list(rows))):
        if place % every == 0:
            drawn.append(
                f'<text class="small" x="{NAMES - 5}" y="{(place + 0.5) * height + 4:.1f}" text-anchor="end">'
            )
            drawn.append(f"{escape(name)}</text>")
    below = bottom + 15
    drawn.append(f'<text x="{NAMES}" y="{below:.1f}">step {steps[0]:,}</text>')
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{below:.1f}" text-anchor="end">{steps[-1]:,}</text>')
    svg = f'<svg viewBox="0 0 {WIDTH} {below + 6:.0f}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    scale = f'<span>{low:.3g}</span><i class="scale" style="background:{_gradient()}"></i><span>{high:.3g}</span>'
    if low == high:
        scale = f"<span>{low:.3g} everywhere</span>"
    return f'<figure><h3>{escape(title)}</h3>{svg}<figcaption class="legend">{scale}</figcaption></figure>'


def shortened(names: list[str]) -> list[str]:
    """Names of layers without what they all begin with, and cut at the left."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts) and len(parts) > 1:
        common += 1
    names = [".".join(each[common:]) for each in parts]
    return [name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}" for name in names]


def png(pixels: Sequence[Sequence[int]]) -> str:
    """A picture as a data URI: level 0 is transparent, 1 to 255 are the colours from low to high."""
    palette = b"".join(bytes(_colour(level)) for level in range(256))
    size = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 3, 0, 0, 0)
    lines = b"".join(b"\0" + bytes(row) for row in pixels)
    parts = ((b"IHDR", size), (b"PLTE", palette), (b"tRNS", b"\0"), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def _level(value: float | None, low: float, high: float) -> int:
    if value is None or not math.isfinite(value):
        return 0
    return 1 + round(254 * (value - low) / (high - low)) if high > low else 128


def _colour(level: int) -> list[int]:
    place = max(0, level - 1) / 254 * (len(STOPS) - 1)
    left = min(int(place), len(STOPS) - 2)
    return [round(a + (b - a) * (place - left)) for a, b in zip(STOPS[left], STOPS[left + 1])]


def _gradient() -> str:
    return f"linear-gradient(90deg,{','.join('rgb({},{},{})'.format(*stop) for stop in STOPS)})"
