"""What a sweep found: its points, what was seen of the intact model, and which points nothing beats."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from llmcompressor_moe.evaluation.latency import SpeedComparison
from llmcompressor_moe.evaluation.report import BaseEvaluation, CompressedEvaluation
from llmcompressor_moe.evidence import Evidence
from llmcompressor_moe.report import ShownPath
from llmcompressor_moe.sweep.choice import Drops
from llmcompressor_moe.sweep.grid import Grid, Point

__all__ = ["PointResult", "SweepReport", "pareto_front"]


class PointResult(BaseModel):
    """One variant of the model.

    :param dropped: what went, by the base's indices
    :param schemes: block index -> scheme of its experts; empty where they stayed in 16 bit
    :param size: bytes of the weight files
    :param found: its evaluation; None for the untouched model, whose is `SweepReport.base`
    :param speed: it beside the untouched model, where speed was asked for: one per engine and shape
    """

    model_config = ConfigDict(extra="forbid")

    point: Point
    dropped: Drops
    schemes: dict[int, str]
    size: int
    found: CompressedEvaluation | None
    speed: list[SpeedComparison] = []

    @property
    def decode_time(self) -> float | None:
        """Measured time per decoded token over the untouched model's, in the last engine (vLLM, where it was
        asked for); None where it was not measured.
        """
        if self.found is None:
            return 1.0
        return 1 / self.speed[-1].reached_ratio if self.speed else None


class SweepReport(BaseModel):
    """A sweep.

    :param model: directory of the base model
    :param evidence: what its calibration run told
    :param source: where the text came from that all points were measured on
    :param points: in the grid's order, the untouched model first
    """

    model_config = ConfigDict(extra="forbid")

    model: ShownPath
    grid: Grid
    evidence: Evidence
    source: ShownPath
    base: BaseEvaluation
    points: list[PointResult]

    def perplexity(self, result: PointResult) -> float:
        """Of one of the points."""
        return (result.found or self.base).text.perplexity

    def read_bytes(self, result: PointResult) -> float:
        """Bytes that decoding one token at batch 1 reads, at the first context length."""
        return (result.found or self.base).cost.decode[0].step

    def front_by_size(self) -> list[str]:
        """Names of the points that no other point beats in both size and perplexity, smallest first."""
        return pareto_front((p.point.name, p.size, self.perplexity(p)) for p in self.points)

    def front_by_reads(self) -> list[str]:
        """The same by bytes read per token, which bound how fast a model decodes."""
        return pareto_front((p.point.name, self.read_bytes(p), self.perplexity(p)) for p in self.points)

    @property
    def timed(self) -> bool:
        """Whether speed was measured at every point that is not the untouched model itself."""
        changed = [p for p in self.points if p.found is not None]
        return bool(changed) and all(p.speed for p in changed)

    def front_by_time(self) -> list[str]:
        """The same by measured time per decoded token."""
        return pareto_front((p.point.name, p.decode_time, self.perplexity(p)) for p in self.points)


def pareto_front(points: Iterable[tuple[str, float, float]]) -> list[str]:
    """Names of the points that no other is better than in one and at least as good as in the other number.

    :param points: name, cost, loss; less is better in both. Of points that are alike the first stays
    :return: by rising cost
    """
    front: list[str] = []
    best = float("inf")
    for name, _, loss in sorted(points, key=lambda point: (point[1], point[2])):
        if loss < best:
            front.append(name)
            best = loss
    return front
