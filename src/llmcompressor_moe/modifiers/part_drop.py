"""What Layer Drop and Block Drop have in common: one score per part, and a number, a share or a threshold of
parts to drop.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from llmcompressor.core import State
from pydantic import Field, model_validator

from llmcompressor_moe.criteria import Metric, part_metric
from llmcompressor_moe.modifiers.trim import TrimModifier
from llmcompressor_moe.plan import amount_of, parts_to_drop
from llmcompressor_moe.profile import Profile, Statistic, divergence_without
from llmcompressor_moe.report import DropReport
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["PartDropModifier"]


class PartDropModifier(TrimModifier):
    """Drops whole parts of a stack of blocks by a score.

    :param num_drop: how many parts go
    :param drop_ratio: share of the parts that goes, rounded down
    :param threshold: parts more similar than this go (for ``kl``: parts whose loss changes the output by
        less)
    :param metric: ``cosine``, ``kl``, or the baselines ``random`` and ``last``
    :param search: ``one_shot`` scores the model once; ``greedy`` scores again after each drop (one more pass
        per drop)
    :param kl_samples: sequences that the ``kl`` metric looks at
    """

    num_drop: int | None = None
    drop_ratio: float | None = None
    threshold: float | None = None
    metric: str = "cosine"
    search: Literal["one_shot", "greedy"] = "one_shot"
    kl_samples: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _check_amount(self) -> PartDropModifier:
        metric = part_metric(self.metric)
        if self.num_drop is not None and self.num_drop < 1:
            raise ValueError(f"num_drop={self.num_drop} must be at least 1.")
        if self.drop_ratio is not None and not 0 < self.drop_ratio < 1:
            raise ValueError(f"drop_ratio={self.drop_ratio} must lie between 0 and 1.")
        if self.threshold is not None and not metric.thresholds:
            raise ValueError(
                f"threshold={self.threshold} means nothing for metric={self.metric!r}; give num_drop."
            )
        explicit = self._explicit()
        if explicit is not None and (not explicit or len(set(explicit)) != len(explicit)):
            raise ValueError(
                f"{self._amount_fields()[-2]}={explicit} must name at least one index, each only once."
            )
        if explicit is not None and set(explicit) & set(self.protect):
            raise ValueError(
                f"{self._amount_fields()[-2]}={explicit} and protect={self.protect} name the same indices."
            )
        return self

    # What each kind of part says of itself

    @abstractmethod
    def _explicit(self) -> list[int] | None:
        """Indices named by the user."""

    @abstractmethod
    def _candidates(self) -> list[int]:
        """Parts that are there now and could go."""

    @abstractmethod
    def _drop(self, index: int) -> None:
        """Bypass one part."""

    @abstractmethod
    def _part(self) -> Literal["block", "layer"]:
        """Name of the part for scores and messages."""

    @abstractmethod
    def _similarity(self, profile: Profile) -> dict[int, float]:
        """The profile's cosine per part."""

    # TrimModifier

    def _needs_data(self) -> bool:
        return self._explicit() is None and self.plan_path is None and part_metric(self.metric).needs_data

    def _statistics(self) -> set[Statistic]:
        if not (self._needs_data() and part_metric(self.metric).from_profile):
            return set()
        return {Statistic.BLOCK if self._part() == "block" else Statistic.LAYER}

    def _check_model(self, session: TrimSession) -> None:
        explicit = self._explicit()
        present = self._candidates()
        if explicit is not None:
            self._check_indices(explicit)
        elif self.plan_path is not None:
            self._check_indices(self._load_plan())
        elif self.threshold is None:
            count = self._count()
            free = len(set(present) - set(self.protect))
            if count > free:
                raise ValueError(
                    f"{count} {self._part()}s are to be dropped, but only {free} of {len(present)} are not "
                    f"protected."
                )

    def _check_indices(self, indices: Sequence[int]) -> None:
        present = self._candidates()
        unknown = sorted(set(indices) - set(present))
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: {unknown} cannot be dropped; the model's {self._part()}s are "
                f"{present}."
            )
        if len(set(indices)) >= len(present):
            raise ValueError(
                f"{type(self).__name__}: dropping {sorted(indices)} would drop every {self._part()}; one "
                f"must stay."
            )

    def _decide(self) -> DropReport:
        if self._explicit() is not None or self.plan_path is not None:
            dropped = sorted(self._explicit() or self._load_plan())
            return self._report_of(dict.fromkeys(self._all_parts()), dropped, None)
        metric = part_metric(self.metric)
        profile = self._profile() if metric.from_profile else None
        scores = self._scores(metric, profile)
        dropped = (
            self._greedy(metric, scores) if self.search == "greedy" else self._choose(metric, scores, profile)
        )
        return self._report_of({**dict.fromkeys(self._all_parts()), **scores}, dropped, profile)

    def _cut(self, dropped: Any, state: State) -> None:
        for index in dropped:
            self._drop(index)

    def _count(self) -> int | None:
        if self.threshold is not None:
            return None
        return amount_of(self.num_drop, self.drop_ratio, len(self._candidates()), f"{self._part()}s")

    def _choose(self, metric: Metric, scores: dict[int, float], profile: Profile | None) -> list[int]:
        return parts_to_drop(
            scores,
            count=self._count(),
            threshold=self.threshold,
            drop_highest=metric.drop_highest,
            protect=self.protect,
        )

    def _scores(self, metric: Metric, profile: Profile | None) -> dict[int, float]:
        candidates = self._candidates()
        if metric.score is not None:
            return metric.score(candidates, self.seed)
        if profile is not None:
            similarity = self._similarity(profile)
            return {index: similarity[index] for index in candidates if index in similarity}
        return self._divergence([(index,) for index in candidates])

    def _divergence(self, candidates: Sequence[tuple[int, ...]]) -> dict[int, float]:
        batches, sequences = [], 0
        for batch in self._batches:
            if sequences >= self.kl_samples:
                break
            batches.append(batch)
            sequences += len(batch["input_ids"])
        session = self._session
        return divergence_without(session.model, session.topology, batches, candidates, self._part())

    def _greedy(self, metric: Metric, scores: dict[int, float]) -> list[int]:
        """Drop one part at a time, each time by scores of what is left."""
        count = self._count()
        dropped: list[int] = []
        while count is None or len(dropped) < count:
            free = {index: score for index, score in scores.items() if index not in self.protect}
            if len(scores) <= 1 or not free:
                break
            best = parts_to_drop(free, count=1, drop_highest=metric.drop_highest)[0]
            expendable = scores[best] > self.threshold if metric.drop_highest and count is None else True
            if count is None and not metric.drop_highest:
                expendable = scores[best] < self.threshold
            if not expendable:
                break
            self._drop(best)
            dropped.append(best)
            if count is None or len(dropped) < count:
                scores = self._scores(
                    metric, self._measure(self._statistics()) if metric.from_profile else None
                )
        return sorted(dropped)

    def _report_of(self, scores: dict[int, Any], dropped: list[int], profile: Profile | None) -> DropReport:
        kept = [
            index
            for index in self._all_parts()
            if index not in dropped and index in self._live_before(dropped)
        ]
        return self._new_report(scores, dropped, kept, profile)

    def _live_before(self, dropped: list[int]) -> set[int]:
        return {*self._candidates(), *dropped}

    @abstractmethod
    def _all_parts(self) -> list[int]:
        """Every part that the model came with."""
