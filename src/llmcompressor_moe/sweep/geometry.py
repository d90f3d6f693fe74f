"""Where things go in a chart: axes, ticks, labels that do not collide."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "Axis",
    "Box",
    "Label",
    "Placed",
    "axis_for",
    "place_labels",
    "round_ticks",
    "step_boxes",
    "text_width",
]

# Values that differ by more than this factor get a logarithmic axis.
_LOG_FROM = 5.0

# Mean width of a character of common sans-serif fonts over the font size, rounded up.
_CHARACTER = 0.58


@dataclass(frozen=True)
class Box:
    """A rectangle; ``top`` is less than ``bottom`` as in images."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share an area."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        """Whether the other lies within this one."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.right >= other.right
            and self.bottom >= other.bottom
        )


@dataclass(frozen=True)
class Axis:
    """From values to coordinates.

    :param low: smallest value
    :param high: largest value
    :param start: coordinate of ``low``
    :param end: coordinate of ``high``
    :param log: whether equal factors take equal lengths
    :param ticks: values to mark, rising, within ``low`` and ``high``
    """

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Coordinate of a value."""
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


@dataclass(frozen=True)
class Label:
    """A text that wants to be next to a place.

    :param x: of the place
    :param y: of the place
    :param widths: of the text, in the chart's unit, and of shorter ones to try after it
    :param height: of the text
    """

    x: float
    y: float
    widths: Sequence[float]
    height: float


@dataclass(frozen=True)
class Placed:
    """Where a label goes.

    :param box: what it covers
    :param choice: which of its texts fits
    :param x: where the text is anchored: on the side of its point, as texts are shorter than their boxes
    :param anchor: which part of the text is there: ``start``, ``middle`` or ``end``
    """

    box: Box
    choice: int
    x: float
    anchor: str


def round_ticks(low: float, high: float, about: int = 5) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten within two values, at most half as many again as asked for.

    :raises ValueError: ``high`` is not above ``low``
    """
    if not high > low:
        raise ValueError(f"high={high} must be above low={low}.")
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Decimal digits are rounded off again that the multiplication leaves behind, as in 3 x 0.1.
    digits = max(0, -math.floor(math.log10(step)) + 1)
    ticks = (round(number * step, digits) for number in range(first, last + 1))
    return tuple(tick for tick in ticks if low <= tick <= high)


def axis_for(values: Iterable[float], start: float, end: float, about: int = 5) -> Axis:
    """An axis with some room at both ends; logarithmic where positive values span more than a factor of 5.

    :param values: finite
    :raises ValueError: there are none
    """
    found = list(values)
    if not found:
        raise ValueError("an axis needs at least one value.")
    low, high = min(found), max(found)
    if low > 0 and high / low > _LOG_FROM:
        room = (high / low) ** 0.06
        low, high = low / room, high * room
        ticks = _log_ticks(low, high)
        return Axis(low, high, start, end, True, ticks)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    return Axis(low, high, start, end, False, round_ticks(low, high, about))


def place_labels(
    labels: Sequence[Label], obstacles: Sequence[Box], area: Box, distance: float
) -> list[Placed | None]:
    """Where each label goes, earlier ones first; None where every place around its point is taken.

    :param obstacles: what labels must not cover
    :param area: what they must stay in
    :param distance: between a point and its label; twice as much where nothing nearer is free
    """
    taken = list(obstacles)
    placed: list[Placed | None] = []
    for label in labels:
        found = next(
            (
                Placed(box, choice, *_anchor(box, label))
                for away in (distance, 2 * distance)
                for choice, width in enumerate(label.widths)
                for box in _around(label, width, away)
                if area.holds(box) and not any(box.overlaps(other) for other in taken)
            ),
            None,
        )
        placed.append(found)
        if found is not None:
            taken.append(found.box)
    return placed


def step_boxes(places: Sequence[tuple[float, float]]) -> list[Box]:
    """What a line of steps covers that goes right first and then down, for labels to keep off."""
    return [
        box
        for (left, top), (right, bottom) in itertools.pairwise(places)
        for box in (Box(left, top - 1, right, top + 1), Box(right - 1, top, right + 1, bottom))
    ]


def text_width(text: str, size: float) -> float:
    """Width of a text in a sans-serif font of a size, roughly and rather too much."""
    return len(text) * size * _CHARACTER


def _anchor(box: Box, label: Label) -> tuple[float, str]:
    if box.left >= label.x:
        return box.left, "start"
    if box.right <= label.x:
        return box.right, "end"
    return label.x, "middle"


def _around(label: Label, width: float, away: float) -> Iterable[Box]:
    height = label.height
    aslant = away * 0.75
    for left, top in (
        (label.x + away, label.y - height / 2),
        (label.x + aslant, label.y - aslant - height),
        (label.x + aslant, label.y + aslant),
        (label.x - width / 2, label.y - away - height),
        (label.x - width / 2, label.y + away),
        (label.x - away - width, label.y - height / 2),
        (label.x - aslant - width, label.y - aslant - height),
        (label.x - aslant - width, label.y + aslant),
    ):
        yield Box(left, top, left + width, top + height)


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # Fewer of each power of ten the more of them there are.
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [factor * 10.0**power for power in powers[:: max(1, len(powers) // 8)] for factor in factors]
    return tuple(float(f"{tick:.6g}") for tick in ticks if low <= tick <= high)
