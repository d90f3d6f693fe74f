"""The table of all points: its columns, how numbers are written, what each means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmcompressor_moe.evaluation.report import CompressedEvaluation
from llmcompressor_moe.sizes import bytes_text, count_text, share_text
from llmcompressor_moe.sweep.curves import KINDS, kind_of
from llmcompressor_moe.sweep.report import PointResult, SweepReport

__all__ = ["NOTHING", "Cell", "Column", "columns_of", "increase", "number_text", "signed_share_text"]

NOTHING = "\u2013"
"""Stands where there is no number."""

_THIN_SPACE = "\u202f"
_MINUS = "\u2212"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    :param text: what is read
    :param value: what it is sorted by; None sorts last
    """

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Column:
    """A column of the table of points.

    :param meaning: what it is, its unit, whether less is better
    :param cell: from a point to its cell
    """

    title: str
    meaning: str
    cell: Callable[[PointResult], Cell]


def number_text(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, trailing zeros among them."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else f"{_MINUS}infinite"
    if abs(value) >= 1e9:
        return f"{value:.2e}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}".replace(",", _THIN_SPACE)
    return f"{value:#.{digits}g}".rstrip(".")


def signed_share_text(share: float) -> str:
    """A change as percent: ``+12.5 %``."""
    if not math.isfinite(share):
        return number_text(share)
    return f"{100 * share:+,.1f} %".replace("-", _MINUS).replace(",", _THIN_SPACE)


def increase(report: SweepReport, result: PointResult) -> float:
    """Of the perplexity, as a share of the untouched model's."""
    return report.perplexity(result) / report.base.text.perplexity - 1


def columns_of(report: SweepReport) -> list[Column]:
    """What the table says of each point."""
    by_size, by_reads = set(report.front_by_size()), set(report.front_by_reads())

    def front(result: PointResult) -> Cell:
        name = result.point.name
        on = [what for what, found in (("size", by_size), ("bytes read", by_reads)) if name in found]
        return Cell(" and ".join(on) or "no", len(on))

    context = report.base.cost.decode[0].context
    return [
        Column("What was done", "what was dropped; mean bits per weight of the experts that are left", _done),
        Column("Size", "bytes of the weight files; less is better", _plain(lambda p: p.size, bytes_text)),
        Column(
            "Share of base",
            "size over the size of the untouched model; less is better",
            _plain(lambda p: p.size / report.points[0].size, share_text),
        ),
        Column(
            "Active parameters",
            "weights that one token passes; less is faster",
            _plain(lambda p: (p.found or report.base).cost.active_parameters, count_text),
        ),
        Column(
            "Bytes read",
            f"bytes that decoding one token reads at batch 1 and {context} tokens of context, weights and KV "
            "cache; less is faster",
            _plain(report.read_bytes, bytes_text),
        ),
        *(
            [
                Column(
                    "Decode time",
                    "measured time per decoded token over the untouched model's; less is faster",
                    _plain(lambda p: p.decode_time, number_text),
                )
            ]
            if report.timed
            else []
        ),
        Column("Perplexity", "on held-out text; less is better", _plain(report.perplexity, number_text)),
        Column(
            "Increase",
            "of perplexity, as a share of the untouched model's; less is better",
            _plain(lambda p: increase(report, p), signed_share_text),
        ),
        Column(
            "Bits per byte",
            "bits that coding a byte of the text takes; less is better",
            _plain(lambda p: (p.found or report.base).text.bits_per_byte, number_text),
        ),
        Column(
            "KL",
            "divergence of the next token's distribution from the untouched model's, mean over predictions, in "
            "nats; less is better",
            _compared(lambda found: found.agreement.mean_kl, lambda value: number_text(value, 3)),
        ),
        Column(
            "Top-1 agreement",
            "share of predictions whose most probable token is the untouched model's; more is better",
            _compared(lambda found: found.agreement.top1_agreement, share_text),
        ),
        Column(
            "Routing overlap",
            "share of a token's experts that are chosen again, of those that the untouched model would choose "
            "among what is left; more is better",
            _compared(
                lambda found: found.routing.mean.top_k_overlap_kept if found.routing.mean else None,
                share_text,
            ),
        ),
        Column(
            "On the front",
            "no other point is better in perplexity and at least as good in size, or in bytes read",
            front,
        ),
    ]


def _plain(
    read: Callable[[PointResult], float], write: Callable[[float], str]
) -> Callable[[PointResult], Cell]:
    return lambda result: Cell(write(read(result)), read(result))


def _compared(
    read: Callable[[CompressedEvaluation], float | None], write: Callable[[float], str]
) -> Callable[[PointResult], Cell]:
    """Figures that only a compressed model has."""

    def cell(result: PointResult) -> Cell:
        value = None if result.found is None else read(result.found)
        return Cell(NOTHING, None) if value is None else Cell(write(value), value)

    return cell


def _done(result: PointResult) -> Cell:
    # Sorted by kind, then by how much; no bits are as many as there are.
    point = result.point
    order = list(KINDS).index(kind_of(point))
    bits = 99.0 if point.bits is None else point.bits
    return Cell(str(point), f"{order} {point.blocks:05} {point.layers:05} {point.experts:05} {bits:08.3f}")
