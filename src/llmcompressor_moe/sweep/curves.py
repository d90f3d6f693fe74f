"""What a trade-off curve shows, whoever draws it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmcompressor_moe.sweep.grid import Point
from llmcompressor_moe.sweep.report import PointResult, SweepReport

__all__ = ["KINDS", "Curve", "CurvePoint", "kind_of", "label_of", "trade_off_curves"]

KINDS = {
    "base": "untouched model",
    "blocks": "blocks dropped",
    "layers": "MoE layers dropped",
    "experts": "experts dropped",
    "bits": "fewer bits",
    "combination": "combinations",
}
"""Kind of a point -> what its group is called."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class CurvePoint:
    """One point of a curve.

    :param name: the point's name in the report
    :param label: the same for people, short
    :param code: the same as short as can be
    :param kind: a key of `KINDS`
    :param x: cost, in the curve's unit
    :param y: perplexity
    """

    name: str
    label: str
    code: str
    kind: str
    x: float
    y: float


@dataclass(frozen=True)
class Curve:
    """Perplexity over a cost; less is better in both.

    :param key: short and fit for a file name
    :param cost: what the cost is
    :param unit: its unit
    :param points: those whose perplexity is finite, in the report's order
    :param front: names of the points that no other beats, by rising cost
    :param left_out: names of the points whose perplexity is infinite or no number
    """

    key: str
    cost: str
    unit: str
    points: tuple[CurvePoint, ...]
    front: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def title(self) -> str:
        """What is drawn against what."""
        return f"Held-out perplexity against {self.cost[0].lower()}{self.cost[1:]}"

    @property
    def front_points(self) -> list[CurvePoint]:
        """Points of the front, by rising cost."""
        by_name = {point.name: point for point in self.points}
        return [by_name[name] for name in self.front if name in by_name]


def kind_of(point: Point) -> str:
    """Which of `KINDS` a point is."""
    changed = [
        kind
        for kind, value in (
            ("blocks", point.blocks),
            ("layers", point.layers),
            ("experts", point.experts),
            ("bits", point.bits),
        )
        if value
    ]
    if len(changed) > 1:
        return "combination"
    return changed[0] if changed else "base"


def label_of(point: Point) -> str:
    """What was done to a point, short: ``-1 block, 5 bit``."""
    counts = ((point.blocks, "block"), (point.layers, "layer"), (point.experts, "expert"))
    dropped = " ".join(f"\u2212{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count)
    bits = f"{point.bits:g} bit" if point.bits is not None else ""
    return ", ".join(filter(None, (dropped, bits))) or "untouched"


def _code(point: Point) -> str:
    counts = ((point.blocks, "b"), (point.layers, "l"), (point.experts, "e"))
    dropped = "".join(f"\u2212{count}{what}" for count, what in counts if count)
    bits = f"{point.bits:g} bit" if point.bits is not None else ""
    return " ".join(filter(None, (dropped, bits))) or "untouched"


def trade_off_curves(report: SweepReport) -> list[Curve]:
    """Perplexity against the size of the weight files, against the bytes that decoding a token reads, and, where
    speed was measured, against the time that it takes.
    """
    curves = [
        _in_bytes("size", "Size of the weight files", report, lambda p: p.size, report.front_by_size()),
        _in_bytes(
            "reads", "Bytes read per decoded token", report, report.read_bytes, report.front_by_reads()
        ),
    ]
    if report.timed:
        what, unit = "Time per decoded token", "times the untouched model's"
        curves.append(_curve("time", what, unit, report, lambda p: p.decode_time, report.front_by_time()))
    return curves


def _in_bytes(
    key: str, cost: str, report: SweepReport, value: Callable[[PointResult], float], front: list[str]
) -> Curve:
    power = _power(max((value(p) for p in report.points if math.isfinite(report.perplexity(p))), default=0.0))
    return _curve(key, cost, _UNITS[power], report, lambda p: value(p) / 1024**power, front)


def _curve(
    key: str,
    cost: str,
    unit: str,
    report: SweepReport,
    value: Callable[[PointResult], float],
    front: list[str],
) -> Curve:
    finite = [p for p in report.points if math.isfinite(report.perplexity(p))]
    return Curve(
        key=key,
        cost=cost,
        unit=unit,
        points=tuple(
            CurvePoint(
                name=p.point.name,
                label=label_of(p.point),
                code=_code(p.point),
                kind=kind_of(p.point),
                x=value(p),
                y=report.perplexity(p),
            )
            for p in finite
        ),
        front=tuple(front),
        left_out=tuple(p.point.name for p in report.points if not math.isfinite(report.perplexity(p))),
    )


def _power(nbytes: float) -> int:
    power = 0
    while nbytes >= 1024 and power + 1 < len(_UNITS):
        nbytes /= 1024
        power += 1
    return power
