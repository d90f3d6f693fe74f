"""From a sweep's report to what a page shows of it: plain data, no markup."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmcompressor_moe.evaluation.report import CompressedEvaluation
from llmcompressor_moe.sizes import share_text
from llmcompressor_moe.sweep.columns import NOTHING, increase
from llmcompressor_moe.sweep.report import PointResult, SweepReport
from llmcompressor_moe.sweep.svg import MapRow, StripRow

__all__ = [
    "Budget",
    "Coverage",
    "StackRow",
    "base_shares",
    "budgets",
    "coverage",
    "coverage_rows",
    "experts_per_layer",
    "map_rows",
    "most_interesting",
    "part_rows",
    "point_shares",
    "stack",
]

_BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Budget:
    """The smallest point that loses no more than a share of the untouched model's perplexity."""

    share: float
    result: PointResult


@dataclass(frozen=True)
class StackRow:
    """One block in a point.

    :param attention: ``kept`` or ``gone``
    :param layer: ``kept``, ``gone``, or ``dense``: an MLP that every token passes
    :param experts: ``6 of 8``
    :param kept_share: of its experts
    :param scheme: of its experts
    :param overlap: of its router's choices with the untouched model's
    :param load_cv: coefficient of variation of its experts' load, before and after
    :param never: experts that no token chooses, before and after
    """

    block: int
    attention: str
    layer: str
    experts: str
    kept_share: float
    scheme: str
    overlap: str
    load_cv: str
    never: str


@dataclass(frozen=True)
class Coverage:
    """Calibration tokens of one MoE layer's experts.

    :param unseen: how many experts saw none, and which
    """

    block: int
    experts: int
    least: int
    median: float
    most: int
    unseen: str


def budgets(report: SweepReport) -> list[Budget]:
    """For each share the smallest point that keeps it; shares that allow nothing smaller are left out."""
    found: list[Budget] = []
    for share in _BUDGETS:
        within = [result for result in report.points if increase(report, result) <= share]
        best = min(within, key=lambda result: (result.size, report.perplexity(result)), default=None)
        if best is not None and best.found is not None and (not found or best is not found[-1].result):
            found.append(Budget(share, best))
    return found


def most_interesting(report: SweepReport) -> PointResult:
    """The smallest point that loses at most a tenth, else the one that loses least, else the untouched model."""
    compressed = [result for result in report.points if result.found is not None]
    within = [result for result in compressed if increase(report, result) <= 0.1]
    if within:
        return min(within, key=lambda result: result.size)
    return min(compressed, key=lambda result: increase(report, result), default=report.points[0])


def part_rows(report: SweepReport) -> list[StripRow]:
    """What each block and MoE layer of the intact model changes."""
    evidence = report.evidence
    return [
        *(
            StripRow(title, values, {block: max(0.0, 1 - value) for block, value in values.items()})
            for title, values in (
                ("Block: similarity (cosine)", evidence.block_similarity),
                ("MoE layer: similarity (cosine)", evidence.layer_similarity),
            )
        ),
        StripRow("Without the block: KL (nats)", evidence.block_divergence, evidence.block_divergence),
        StripRow("Without the MoE layer: KL (nats)", evidence.layer_divergence, evidence.layer_divergence),
    ]


def experts_per_layer(report: SweepReport) -> dict[int, int]:
    """Block index -> routed experts of the untouched model."""
    return {block: len(layer.routed_tokens) for block, layer in sorted(report.evidence.layers.items())}


def base_shares(report: SweepReport) -> dict[int, Sequence[float | None]]:
    """Block index -> each expert's share of all choices in the untouched model, on the evaluation text.

    From the first point that has the layer: all saw the same tokens. Layers that no point kept are not in it.
    """
    found: dict[int, Sequence[float | None]] = {}
    for result in report.points:
        for block, layer in result.found.routing.layers.items() if result.found else ():
            if layer.routing.utilization_before:
                found.setdefault(block, layer.routing.utilization_before)
    return dict(sorted(found.items()))


def point_shares(report: SweepReport, found: CompressedEvaluation) -> dict[int, Sequence[float | None]]:
    """Block index of the untouched model -> each expert's share of a point's choices; None for what is gone."""
    shares: dict[int, Sequence[float | None]] = {}
    for block, experts in experts_per_layer(report).items():
        layer = found.routing.layers.get(block)
        if layer is None or not layer.routing.utilization_after:
            shares[block] = [None] * experts
            continue
        kept = set(layer.kept_experts)
        shares[block] = [
            value if expert in kept else None for expert, value in enumerate(layer.routing.utilization_after)
        ]
    return shares


def map_rows(shares: Mapping[int, Sequence[float | None]]) -> list[MapRow]:
    """Shares as multiples of an even one, which is one over the layer's experts before anything was dropped."""
    return [
        MapRow(block, [None if value is None else value * len(values) for value in values])
        for block, values in shares.items()
    ]


def stack(report: SweepReport, result: PointResult) -> list[StackRow]:
    """A point block by block, by the untouched model's indices."""
    return [_stack_row(report, result, block) for block in range(report.evidence.blocks)]


def coverage(report: SweepReport) -> list[Coverage]:
    """How many calibration tokens came by each layer's experts."""
    unseen = report.evidence.unseen
    return [
        Coverage(
            block=block,
            experts=len(layer.routed_tokens),
            least=min(layer.routed_tokens),
            median=statistics.median(layer.routed_tokens),
            most=max(layer.routed_tokens),
            unseen=_listed(unseen.get(block, [])),
        )
        for block, layer in sorted(report.evidence.layers.items())
    ]


def coverage_rows(report: SweepReport) -> list[MapRow]:
    """The same as multiples of an even share."""
    rows = []
    for block, layer in sorted(report.evidence.layers.items()):
        even = statistics.fmean(layer.routed_tokens) or 1.0
        rows.append(MapRow(block, [count / even for count in layer.routed_tokens]))
    return rows


def _stack_row(report: SweepReport, result: PointResult, block: int) -> StackRow:
    dropped = result.dropped
    layer = report.evidence.layers.get(block)
    total = len(layer.routed_tokens) if layer is not None else 0
    left = total - len(dropped.experts.get(block, ()))
    state = "gone" if block in dropped.blocks or block in dropped.layers else "kept" if total else "dense"
    there = state == "kept"
    seen = result.found.routing.layers.get(block) if there and result.found is not None else None
    routing = seen.routing if seen is not None else None
    overlap = routing.top_k_overlap_kept if routing is not None else None
    return StackRow(
        block=block,
        attention="gone" if block in dropped.blocks else "kept",
        layer=state,
        experts=f"{left} of {total}" if there else NOTHING,
        kept_share=left / total if there else 0.0,
        scheme=result.schemes.get(block, "as stored") if there else NOTHING,
        overlap=share_text(overlap) if overlap is not None else NOTHING,
        load_cv=f"{routing.load_cv_before:.2f} \u2192 {routing.load_cv_after:.2f}" if routing else NOTHING,
        never=f"{routing.dead_before} \u2192 {routing.dead_after}" if routing else NOTHING,
    )


def _listed(numbers: Iterable[int], most: int = 12) -> str:
    found = list(numbers)
    if not found:
        return "none"
    named = [*map(str, found[:most]), *(["\u2026"] if len(found) > most else [])]
    return f"{len(found)}: {', '.join(named)}"
