"""Block Drop: remove whole transformer blocks."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmcompressor_moe.criteria import Metric
from llmcompressor_moe.families import exception_for
from llmcompressor_moe.modifiers.part_drop import PartDropModifier
from llmcompressor_moe.plan import longest_run_beyond, run_to_drop
from llmcompressor_moe.profile import Profile, Statistic
from llmcompressor_moe.report import DropReport
from llmcompressor_moe.saving.expressible import check_blocks_can_go
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["BlockDropModifier"]


class BlockDropModifier(PartDropModifier):
    """Drops transformer blocks (arXiv 2406.02500, Block Drop): attention and feed-forward layer, MoE or
    dense.

    A block's score is the cosine of the residual stream before and after it, mean over tokens; the most
    similar ones go. The result is a plain checkpoint with fewer blocks that anything loads. Takes exactly one
    of ``num_drop``, ``drop_ratio``, ``threshold``, ``blocks`` and ``plan_path``.

    Sample YAML::

        BlockDropModifier:
          num_drop: 5
          pattern: discrete

    :param blocks: indices of the blocks that go; needs no data
    :param pattern: ``discrete`` takes the best blocks wherever they are; ``consecutive`` the best run of
        neighbouring blocks, scored by the residual stream before and after the whole run"""

    blocks: list[int] | None = None
    pattern: Literal["discrete", "consecutive"] = "discrete"

    @model_validator(mode="after")
    def _check_pattern(self) -> BlockDropModifier:
        if self.pattern == "consecutive" and self.search == "greedy":
            raise ValueError("pattern='consecutive' chooses one run at once; use search='one_shot' with it.")
        return self

    def _amount_fields(self) -> tuple[str, ...]:
        return ("num_drop", "drop_ratio", "threshold", "blocks", "plan_path")

    def _explicit(self) -> list[int] | None:
        return self.blocks

    def _part(self) -> Literal["block", "layer"]:
        return "block"

    def _all_parts(self) -> list[int]:
        return [block.index for block in self._session.topology.blocks]

    def _candidates(self) -> list[int]:
        return self._session.blocks

    def _similarity(self, profile: Profile) -> dict[int, float]:
        # A block that lost its MoE layer since is another block than the one that was measured.
        changed = self._shared.layers - set(self._session.layers)
        return {index: score for index, score in profile.block_similarity.items() if index not in changed}

    def _drop(self, index: int) -> None:
        self._session.drop_block(index)

    def _compares_runs(self) -> bool:
        return self.pattern == "consecutive" and self.threshold is None and self._needs_data()

    def _profiles_runs(self) -> bool:
        return self._compares_runs() and self.metric == "cosine"

    def _run_length(self) -> int | None:
        return self._count() if self._profiles_runs() else None

    def _statistics(self) -> set[Statistic]:
        statistics = super()._statistics()
        return {*statistics, Statistic.RUN} if self._profiles_runs() else statistics

    def _check_model(self, session: TrimSession) -> None:
        reason = exception_for(session.topology.model_type).refuse_block_drop
        if reason is not None:
            raise ValueError(f"BlockDropModifier cannot trim {session.topology.model_type!r}: {reason}.")
        super()._check_model(session)
        named = self._explicit() or (self._load_plan() if self.plan_path else None)
        if named is not None:
            check_blocks_can_go(session.model, session.topology.stack, {*named, *session.dropped_blocks})
        else:
            self._check_positions(exception_for(session.topology.model_type).position_period)
        self._check_moe_left(set(named or ()))

    def _check_positions(self, period: int) -> None:
        count = self._count()
        if period > 1 and (self.pattern == "discrete" or (count is not None and count % period)):
            raise ValueError(
                f"BlockDropModifier: vLLM takes the kind of attention of a "
                f"{self._session.topology.model_type!r} block from its index modulo {period}. Use "
                f"pattern='consecutive' with a num_drop that is a multiple of {period}, or name the blocks."
            )

    def _check_moe_left(self, dropped: set[int]) -> None:
        if not set(self._session.layers) - dropped:
            raise ValueError(f"BlockDropModifier: dropping {sorted(dropped)} would leave no MoE layer.")

    def _choose(self, metric: Metric, scores: dict[int, float], profile: Profile | None) -> list[int]:
        if self.pattern == "discrete":
            return super()._choose(metric, scores, profile)
        blocks = self._candidates()
        if self.threshold is not None:
            return longest_run_beyond(
                scores, blocks, self.threshold, drop_highest=metric.drop_highest, protect=self.protect
            )
        length = self._count()
        runs = [tuple(blocks[start : start + length]) for start in range(len(blocks) - length + 1)]
        if profile is not None:
            run_scores = {first: score for first, score in profile.run_similarity.items() if first in blocks}
        elif metric.score is not None:
            run_scores = metric.score([run[0] for run in runs], self.seed)
        else:
            run_scores = self._divergence(runs)
        return run_to_drop(run_scores, blocks, length, drop_highest=metric.drop_highest, protect=self.protect)

    def _decide(self) -> DropReport:
        report = super()._decide()
        dropped = set(report.dropped)
        check_blocks_can_go(
            self._session.model, self._session.topology.stack, dropped | self._session.dropped_blocks
        )
        self._check_moe_left(dropped)
        return report
