"""Where the names of a scatter's points go, so that they run into neither each other nor other points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

POSITIONS = {
    "top right": (1, -1),
    "bottom right": (1, 1),
    "top left": (-1, -1),
    "bottom left": (-1, 1),
    "top center": (0, -1),
    "bottom center": (0, 1),
}
"""plotly's names for the sides of a point, the liked ones first, each as direction to the right and down."""
LETTER_WIDTH, LINE_HEIGHT = 7.0, 16.0
OUTSIDE = 4.0
"""How much worse it is to leave the plot than to cover something."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(across, 0.0) * max(down, 0.0)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True, slots=True)
class Point:
    """A marker in pixels and the text that belongs to it."""

    x: float
    y: float
    radius: float
    text: str

    def marker(self) -> Box:
        return Box(self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)

    def label(self, position: str) -> Box:
        """Where the text is when it stands on that side of the marker."""
        right, down = POSITIONS[position]
        width = LETTER_WIDTH * len(self.text)
        middle_x = self.x + right * (self.radius + width / 2)
        middle_y = self.y + down * (self.radius + LINE_HEIGHT / 2)
        top, bottom = middle_y - LINE_HEIGHT / 2, middle_y + LINE_HEIGHT / 2
        return Box(middle_x - width / 2, top, middle_x + width / 2, bottom)


def place(points: Sequence[Point], *, width: float, height: float) -> list[str]:
    """The side on which each point's text stands, one of `POSITIONS`.

    Greedy, in the order of the points: the side that covers the least of other markers and of earlier texts.
    """
    markers = [point.marker() for point in points]
    plot = Box(0, 0, width, height)
    placed: list[Box] = []
    sides: list[str] = []
    for point in points:
        costs = {side: _cost(point.label(side), [*markers, *placed], plot) for side in POSITIONS}
        side = min(costs, key=lambda each: costs[each])
        sides.append(side)
        placed.append(point.label(side))
    return sides


def _cost(label: Box, others: Sequence[Box], plot: Box) -> float:
    return sum(label.overlap(other) for other in others) + OUTSIDE * (label.area - label.overlap(plot))
