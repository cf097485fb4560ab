"""Where the labels of a chart's points go: beside their markers, and never on each other. Pixels, y downwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

SIZE = 13
"""Font size of a label."""
LETTER, LINE = 0.62 * SIZE, 1.2 * SIZE
"""Width of a letter and height of a line, in the widest of the fonts that a page may be shown in."""
MARKER = 6.0
"""Half of a marker's side."""


Point = tuple[float, float]


class Box(NamedTuple):
    """A rectangle."""

    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two have a piece in common."""
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: Box) -> bool:
        """Whether nothing of it is beyond the other one."""
        return other.left <= self.left and self.right <= other.right and other.top <= self.top and self.bottom <= other.bottom


class Spot(NamedTuple):
    """Where text stands beside its point, in the words of a chart's text mark."""

    align: str
    baseline: str
    dx: int
    dy: int

    def box(self, x: float, y: float, text: str) -> Box:
        """What the text covers."""
        width = LETTER * len(text)
        left = {"left": x, "right": x - width, "center": x - width / 2}[self.align] + self.dx
        top = {"top": y, "bottom": y - LINE, "middle": y - LINE / 2}[self.baseline] + self.dy
        return Box(left, left + width, top, top + LINE)


ABOVE = Spot("left", "bottom", 9, -5)
BELOW = Spot("right", "top", -7, 6)
SPOTS = (ABOVE, BELOW, Spot("left", "top", 9, 6), Spot("right", "bottom", -7, -5))


@dataclass(frozen=True)
class Label:
    """A label: the place of its point, its text, and where it would best stand."""

    x: float
    y: float
    text: str
    spot: Spot = ABOVE


def place(
    wanted: Sequence[Label], frame: Box, markers: Sequence[Point], taken: Sequence[Box], lines: Sequence[Sequence[Point]] = ()
) -> list[Spot | None]:
    """A spot of each label in turn, None for one that has none which leaves `taken` and all labels before it free.

    Of the free ones it is the first that also stays in the frame, off the markers of other points and off the lines, each given by the
    points that it joins; else the first without the lines, else the first one.
    """
    held, found = list(taken), []
    dots = [Box(x, x, y, y) for line in lines for x, y in _along(line)]
    for label in wanted:
        each = [(spot, spot.box(label.x, label.y, label.text)) for spot in dict.fromkeys((label.spot, *SPOTS))]
        free = [(spot, box) for spot, box in each if not any(box.meets(other) for other in held)]
        others = [_around(x, y) for x, y in markers if (x, y) != (label.x, label.y)]
        clear = [(spot, box) for spot, box in free if box.inside(frame) and not any(box.meets(other) for other in others)]
        best = [(spot, box) for spot, box in clear if not any(box.meets(dot) for dot in dots)]
        spot, box = next(iter(best or clear or free), (None, None))
        found.append(spot)
        held += [] if box is None else [box]
    return found


def _along(line: Sequence[Point]) -> Iterator[Point]:
    """Points on a line, so close that no label fits between two."""
    for (x, y), (to_x, to_y) in itertools.pairwise(line):
        steps = math.ceil(max(abs(to_x - x), abs(to_y - y)) / MARKER)
        yield from ((x + (to_x - x) * i / steps, y + (to_y - y) * i / steps) for i in range(steps))


def _around(x: float, y: float) -> Box:
    return Box(x - MARKER, x + MARKER, y - MARKER, y + MARKER)


def position(value: float, scale: Mapping[str, Any], length: float) -> float:
    """How far from its beginning a value lies on an axis of this length."""
    low, high = scale["domain"]
    if scale.get("type") == "log":
        low, high, value = math.log(low), math.log(high), math.log(max(value, low / 2))
    return length * (value - low) / (high - low) if high > low else length / 2
