"""Metrics for blocks and MoE layers: how little a part changes, so how well it can be missed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["METRICS", "Metric", "part_metric"]


@dataclass(frozen=True)
class Metric:
    """How a metric is obtained and read.

    :param source: where the metric comes from
    :param from_profile: whether a profile holds the scores (otherwise ``score`` or the model's output gives
        them)
    :param drop_highest: whether a high score means that the part can go
    :param thresholds: whether a threshold on the score means anything
    :param score: for metrics that need no data: part indices and seed -> scores
    """

    source: str
    from_profile: bool = False
    drop_highest: bool = True
    thresholds: bool = True
    score: Callable[[Sequence[int], int], dict[int, float]] | None = None

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is needed."""
        return self.score is None


def _random_scores(indices: Sequence[int], seed: int) -> dict[int, float]:
    generator = random.Random(seed)
    return {index: generator.random() for index in sorted(indices)}


def _last_scores(indices: Sequence[int], seed: int) -> dict[int, float]:
    return {index: float(index) for index in indices}


METRICS: dict[str, Metric] = {
    "cosine": Metric(
        source="arXiv 2406.02500, Layer Drop and Block Drop: cosine of the residual stream before and "
        "after the part, "
        "mean over tokens",
        from_profile=True,
    ),
    "kl": Metric(
        source="KL(intact || without the part) of the model's output, mean over tokens, in nats",
        drop_highest=False,
    ),
    "random": Metric(
        source="baseline: uniform at random from the seed", thresholds=False, score=_random_scores
    ),
    "last": Metric(source="baseline: the last parts first", thresholds=False, score=_last_scores),
}


def part_metric(name: str) -> Metric:
    """Look a metric up.

    :raises ValueError: unknown name
    """
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is unknown; choose one of {', '.join(sorted(METRICS))}.")
    return METRICS[name]
