"""The lifecycle that all trimming modifiers share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from llmcompressor.core import Event, State
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator

from llmcompressor_moe.modifiers.base import MoEModifier, recipe_modifiers
from llmcompressor_moe.modifiers.shared import SharedPass
from llmcompressor_moe.profile import Profile, Statistic
from llmcompressor_moe.report import DropReport
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["TrimModifier"]


class TrimModifier(MoEModifier):
    """Base of the drop modifiers: decide once, cut once, tell what happened.

    Lifecycle:
        - on_initialize: look at the model, refuse what cannot work, say which statistics are needed
        - on_calibration_start: get the statistics (one forward pass of our own, shared with the drop
          modifiers next to this one) and decide; blocks and MoE layers are bypassed here
        - on_calibration_end: experts are removed here, after modifiers that share the pass have used them
        - on_finalize: remove what was bypassed, rewrite the config, make saving write a checkpoint that says
          what it is

    :param protect: block indices whose part stays
    :param share_statistics: use the statistics of the drop modifiers directly before this one in the recipe.
        They describe the model before those cut it. False measures again, on what they left
    """

    # Our own pass needs no help from the pipeline: it runs only routed experts, once.
    requires_calibration_data: bool = False

    # Bypassed parts are safe for modifiers that share the pass; experts are removed, so they go after it.
    cuts_before_the_pass: ClassVar[bool] = True

    # What ``dropped`` of a plan must be: block indices, or experts per block.
    plan_kind: ClassVar[type] = list

    protect: list[int] = Field(default_factory=list)
    share_statistics: bool = True

    _shared: SharedPass | None = PrivateAttr(default=None)
    _report: DropReport | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_fields(self) -> TrimModifier:
        self._check_one_of(self._amount_fields())
        self._check_protect(self.protect)
        return self

    # What each modifier says of itself

    @abstractmethod
    def _amount_fields(self) -> tuple[str, ...]:
        """Names of the fields of which exactly one is given."""

    @abstractmethod
    def _check_model(self, session: TrimSession) -> None:
        """Refuse what cannot work on this model, before any calibration."""

    @abstractmethod
    def _statistics(self) -> set[Statistic]:
        """Statistics to profile; empty when no data is needed."""

    @abstractmethod
    def _needs_data(self) -> bool:
        """Whether calibration data is needed, for statistics or otherwise."""

    @abstractmethod
    def _decide(self) -> DropReport:
        """Scores and decision."""

    @abstractmethod
    def _cut(self, dropped: Any, state: State) -> None:
        """Carry the decision out."""

    def _run_length(self) -> int | None:
        """Blocks per run, for those who compare runs."""
        return None

    # Lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Look at the model and the data; see the class."""
        self._join_session(state)
        out_of_range = sorted(set(self.protect) - set(range(len(self._session.topology.blocks))))
        if out_of_range:
            raise ValueError(
                f"protect={self.protect}: the model has {len(self._session.topology.blocks)} blocks; "
                f"{out_of_range} do not exist."
            )
        self._check_model(self._session)
        if self._needs_data():
            self._batches = self._require_data(state, "name the indices to drop")
        group = _group_of(self)
        self._shared = (
            next((other._shared for other in group if other._shared is not None), None) or SharedPass()
        )
        if not self._shared.add(self._statistics(), self._run_length()):
            self._shared = SharedPass()
            self._shared.add(self._statistics(), self._run_length())
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Measure and decide; bypass blocks and MoE layers."""
        if self._statistics():
            # Before an earlier decision is taken over: neighbours compare with the model as it was here.
            self._profile()
        self._report = self._kept_decision(DropReport, self._decide)
        if self.cuts_before_the_pass:
            self._cut(self._report.dropped, state)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Remove experts; tell what happened."""
        if not self.cuts_before_the_pass:
            self._cut(self._report.dropped, state)
        self._publish(self._report)
        logger.info(f"{type(self).__name__}: dropped {self._report.dropped}")

    # Helpers for subclasses

    def _profile(self) -> Profile:
        """The statistics that this modifier and its neighbours asked for."""
        return self._shared.get(self._session, self._measure)

    def _new_report(self, scores: Any, dropped: Any, kept: Any, profile: Profile | None) -> DropReport:
        return DropReport(scores=scores, dropped=dropped, kept=kept, **self._report_heading(profile))

    def _load_plan(self) -> Any:
        """The ``dropped`` of the saved plan."""
        report = self._load_report(DropReport)
        report.check_drops(self.plan_kind)
        return report.dropped


def _group_of(modifier: TrimModifier) -> list[TrimModifier]:
    """The trimming modifiers that stand in a row with this one and share its statistics."""
    group: list[TrimModifier] = []
    for other in recipe_modifiers():
        if not isinstance(other, TrimModifier):
            group = []
            continue
        group = [*group, other] if other.share_statistics and group else [other]
        if other is modifier:
            return group
    return [modifier]
