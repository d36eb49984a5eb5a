"""Bits per byte against exported bytes, as an SVG that any browser and any README shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 200, 30, 60
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bb5566", "#004488", "#777777", "#000000")
"""Paul Tol's bright scheme and more: told apart by colour-blind readers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A file: `x` bytes, `y` bits per byte."""

    series: str
    label: str
    x: float
    y: float
    hollow: bool
    """Baselines are drawn hollow."""


def draw(points: Sequence[Point]) -> str:
    """An SVG; bytes on a logarithmic axis. Points of a series are joined, in the order of their size."""
    low, high = math.log10(min(p.x for p in points) * 0.93), math.log10(max(p.x for p in points) * 1.07)
    bottom, top = min(p.y for p in points), max(p.y for p in points)
    margin = 0.06 * (top - bottom or 1.0)
    bottom, top = bottom - margin, top + margin

    def x(size: float) -> float:
        return LEFT + (math.log10(size) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(bits: float) -> float:
        return HEIGHT - BOTTOM - (bits - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12"><title>Bits per byte against exported bytes (GGUF)</title>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for size in _sizes(10**low, 10**high):
        lines += _rule(x(size), TOP, x(size), HEIGHT - BOTTOM)
        lines.append(_text(x(size), HEIGHT - BOTTOM + 18, f"{size / 1000:,.0f} kB", "middle"))
    for bits in _ticks(bottom, top):
        lines += _rule(LEFT, y(bits), WIDTH - RIGHT, y(bits))
        lines.append(_text(LEFT - 8, y(bits) + 4, f"{bits:.2f}", "end"))
    lines.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 15, "exported bytes (GGUF file, logarithmic)", "middle"))
    lines.append(_text(LEFT, 18, "bits per byte of held-out text: lower is better", "start"))
    for number, series in enumerate(dict.fromkeys(p.series for p in points)):
        colour = COLOURS[number % len(COLOURS)]
        mine = sorted((p for p in points if p.series == series), key=lambda p: p.x)
        joined = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in mine)
        dashes = ' stroke-dasharray="4 3"' if mine[0].hollow else ""
        lines.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.2"{dashes}/>')
        for p in mine:
            fill = "white" if p.hollow else colour
            lines.append(
                f'<circle cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="4.5" fill="{fill}" stroke="{colour}" '
                f'stroke-width="1.8"><title>{escape(p.label)}: {p.x:,.0f} bytes, {p.y:.4f}</title></circle>'
            )
        height = TOP + 14 + 20 * number
        fill = "white" if mine[0].hollow else colour
        lines.append(
            f'<circle cx="{WIDTH - RIGHT + 24}" cy="{height}" r="4.5" fill="{fill}" stroke="{colour}" '
            'stroke-width="1.8"/>'
        )
        lines.append(_text(WIDTH - RIGHT + 36, height + 4, series, "start"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _rule(x1: float, y1: float, x2: float, y2: float) -> list[str]:
    return [f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>']


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333333">{escape(text)}</text>'


def _sizes(low: float, high: float) -> Iterator[float]:
    """1, 1.5, 2, 3, 5, 7 times a power of ten, inside the range."""
    for power in range(int(math.log10(low)), int(math.log10(high)) + 1):
        for digit in (1, 1.5, 2, 3, 5, 7):
            if low <= digit * 10**power <= high:
                yield digit * 10**power


def _ticks(low: float, high: float) -> Iterator[float]:
    """Round numbers inside the range, about eight."""
    rough = (high - low) / 8
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield number * step
