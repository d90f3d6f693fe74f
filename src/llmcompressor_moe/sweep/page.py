"""A sweep as one HTML file that needs nothing else: no server, no network, no script to be read."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from llmcompressor_moe.checkpoint.files import write_text
from llmcompressor_moe.report import shown_path
from llmcompressor_moe.sizes import bytes_text, share_text
from llmcompressor_moe.sweep.columns import columns_of, increase, number_text, signed_share_text
from llmcompressor_moe.sweep.curves import KINDS, Curve, kind_of, label_of, trade_off_curves
from llmcompressor_moe.sweep.report import PointResult, SweepReport
from llmcompressor_moe.sweep.svg import BANDS, cell_map, definitions, marker, scatter, strips, swatch
from llmcompressor_moe.sweep.views import (
    StackRow,
    base_shares,
    budgets,
    coverage,
    coverage_rows,
    experts_per_layer,
    map_rows,
    most_interesting,
    part_rows,
    point_shares,
    stack,
)

__all__ = ["render_page", "write_page"]

# Experts of all points together up to which each one's share is also given as a number, some bytes apiece.
_MOST_NUMBERS = 20_000

_METRICS = {"cosine": "similarity (cosine)", "kl": "divergence without them (KL)"}

_CRITERIA = {
    "router_score": "mean score of the router",
    "frequency": "how often they are chosen",
    "reap": "REAP (router-weighted norm of their output)",
    "output_norm": "norm of their output",
}


@dataclass(frozen=True)
class _PointView:
    """Everything about one point.

    :param numbers: block, then share of all choices per expert, in percent; empty where there are too many
    """

    id: str
    result: PointResult
    kind: str
    summary: str
    stack: list[StackRow]
    map: Markup | None
    numbers: list[tuple[int, list[str]]]


def write_page(report: SweepReport, path: str | Path) -> None:
    """Write a sweep as one HTML file.

    :raises OutputDirectoryError: it cannot be written
    """
    write_text(path, render_page(report))


def render_page(report: SweepReport) -> str:
    """A sweep as HTML: no resource is fetched, all text is escaped, and no script but the page's own may run."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = _resource("page.js")
    targets = {result.point.name: f"p{number}" for number, result in enumerate(report.points)}
    columns = columns_of(report)
    base = base_shares(report)
    return environment.from_string(_resource("page.html.j2")).render(
        report=report,
        shown_path=shown_path,
        model_name=Path(report.model).name or report.model,
        style=Markup(_resource("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        metrics=_METRICS,
        criterion=_CRITERIA[report.grid.criterion],
        kinds=KINDS,
        definitions=definitions(),
        curves=[(curve, _drawn(curve, targets)) for curve in trade_off_curves(report)],
        legend=_legend(report),
        bands=[(swatch(str(number)), text) for number, text in enumerate(BANDS)],
        gone=swatch("gone"),
        never=swatch("never"),
        budgets=budgets(report),
        targets=targets,
        label_of=label_of,
        size=lambda result: bytes_text(result.size),
        share=lambda result: share_text(result.size / report.points[0].size),
        increase=lambda result: signed_share_text(increase(report, result)),
        number=number_text,
        columns=columns,
        rows=[(result, [column.cell(result) for column in columns]) for result in report.points],
        parts=part_rows(report),
        part_map=strips(
            "parts", "What each block and MoE layer changes", report.evidence.blocks, part_rows(report)
        ),
        before=_base_map(base),
        before_numbers=_percent(base) if _few_enough(report) else [],
        views=[_view(report, result, targets[result.point.name]) for result in report.points],
        shown=targets[most_interesting(report).point.name],
        coverage=coverage(report),
        coverage_map=_coverage_map(report),
        stability={name.replace("_", " "): value for name, value in report.evidence.stability.items()},
    )


def _resource(name: str) -> str:
    return files("llmcompressor_moe.sweep").joinpath(name).read_text(encoding="utf-8")


def _drawn(curve: Curve, targets: Mapping[str, str]) -> Markup | None:
    if not curve.points:
        return None
    return scatter(curve, {name: f"#{target}" for name, target in targets.items()})


def _legend(report: SweepReport) -> list[tuple[Markup, str]]:
    kinds = {kind_of(result.point) for result in report.points}
    return [(marker(kind), name) for kind, name in KINDS.items() if kind in kinds]


def _base_map(shares: Mapping[int, Sequence[float | None]]) -> Markup | None:
    if not shares:
        return None
    never = sum(value == 0 for values in shares.values() for value in values)
    return cell_map(
        "before",
        "Untouched model: how often each expert is chosen",
        f"{len(shares)} MoE layers; {never} experts are never chosen on the evaluation text.",
        map_rows(shares),
    )


def _view(report: SweepReport, result: PointResult, key: str) -> _PointView:
    shares = point_shares(report, result.found) if result.found is not None else {}
    return _PointView(
        id=key,
        result=result,
        kind=kind_of(result.point),
        summary=f"{bytes_text(result.size)}, perplexity {number_text(report.perplexity(result))}",
        stack=stack(report, result),
        map=_point_map(result, shares, key),
        numbers=_percent(shares) if _few_enough(report) else [],
    )


def _point_map(result: PointResult, shares: Mapping[int, Sequence[float | None]], key: str) -> Markup | None:
    if not shares:
        return None
    every = [value for values in shares.values() for value in values]
    return cell_map(
        f"{key}-map",
        f"{label_of(result.point)}: how often each expert is chosen",
        f"{every.count(None)} of {len(every)} experts are gone, dropped by themselves or with their layer or "
        f"block; {every.count(0)} of those left are never chosen on the evaluation text.",
        map_rows(shares),
    )


def _coverage_map(report: SweepReport) -> Markup:
    unseen = sum(map(len, report.evidence.unseen.values()))
    return cell_map(
        "coverage",
        "Calibration tokens per expert",
        f"{unseen} of {sum(experts_per_layer(report).values())} experts saw no calibration token.",
        coverage_rows(report),
    )


def _few_enough(report: SweepReport) -> bool:
    return sum(experts_per_layer(report).values()) * len(report.points) <= _MOST_NUMBERS


def _percent(shares: Mapping[int, Sequence[float | None]]) -> list[tuple[int, list[str]]]:
    return [
        (block, ["gone" if value is None else f"{100 * value:.1f}" for value in values])
        for block, values in shares.items()
    ]
