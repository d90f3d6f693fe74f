"""What every modifier of this package does: look at the model together, refuse early, complete it once."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from compressed_tensors.distributed import is_distributed, is_source_process
from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr, model_validator

from llmcompressor_moe.modifiers.composition import join_recipe
from llmcompressor_moe.profile import Profile, Statistic, collect_profile
from llmcompressor_moe.report import ModifierReport, ShownPath
from llmcompressor_moe.saving.finish import finish
from llmcompressor_moe.saving.save import remember_earlier_reports
from llmcompressor_moe.surgery.session import TrimSession
from llmcompressor_moe.work_folder import current_work

__all__ = ["MoEModifier", "modifiers_after", "modifiers_before", "recipe_modifiers"]

Report = TypeVar("Report", bound=ModifierReport)

# What llm-compressor's own base class keeps in every modifier.
_LIFECYCLE_FIELDS = {
    "index",
    "group",
    "start",
    "end",
    "update",
    "initialized_",
    "finalized_",
    "started_",
    "ended_",
    "requires_calibration_data",
}


class MoEModifier(Modifier):
    """Base of all modifiers of this package.

    :param report_path: where to write the report (JSON); it can be edited and given back as ``plan_path``
    :param plan_path: a saved report whose decision is applied, without data
    :param seed: seed of random baselines
    """

    report_path: ShownPath | None = None
    plan_path: ShownPath | None = None
    seed: int = 0

    _session: TrimSession | None = PrivateAttr(default=None)
    _later: list[Modifier] = PrivateAttr(default_factory=list)
    _batches: Any = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_report_path(self) -> MoEModifier:
        if self.report_path is not None and not self.report_path.endswith(".json"):
            raise ValueError(f"report_path={self.report_path!r} must end with .json.")
        return self

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """The first of our modifiers to get here completes the model for all of them."""
        finish(self._session)
        self._batches = None
        return True

    # Helpers for subclasses

    def _check_one_of(self, names: tuple[str, ...]) -> None:
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"got {' and '.join(given)}" if given else "got none"
            raise ValueError(f"{type(self).__name__} takes exactly one of {', '.join(names)}; {what}.")

    def _check_protect(self, protect: list[int]) -> None:
        if any(index < 0 for index in protect) or len(set(protect)) != len(protect):
            raise ValueError(f"protect={protect} must be distinct block indices, counted from 0.")

    def _join_session(self, state: State) -> TrimSession:
        """The model as all our modifiers in this recipe see it; the first to ask begins."""
        self._later = modifiers_after(self)
        first = next((other for other in _ours(self) if other._session is not None), None)
        self._session = first._session if first else TrimSession.begin(state.model)
        remember_earlier_reports(state.model)
        _check_writable(self.report_path)
        join_recipe(recipe_modifiers(), state)
        return self._session

    def _settings(self) -> dict[str, Any]:
        """The fields as given, for the report."""
        return self.model_dump(mode="json", exclude_none=True, exclude=_LIFECYCLE_FIELDS)

    def _require_data(self, state: State, way_out: str) -> Any:
        batches = state.data.calib
        name = type(self).__name__
        if batches is None:
            raise ValueError(f"{name} needs calibration data: pass `dataset=` to oneshot, or {way_out}.")
        if len(batches) == 0:
            raise ValueError(f"{name}: the calibration dataset is empty.")
        return batches

    def _measure(self, wanted: Iterable[Statistic], run_length: int | None = None) -> Profile:
        """Statistics of the model as it is now."""
        session, work = self._session, current_work()
        about = {
            "statistics": sorted(wanted),
            "run_length": run_length,
            "dropped": [sorted(session.dropped_blocks), sorted(session.dropped_layers)],
            "experts": {layer: session.expert_ids(layer) for layer in session.layers},
        }
        return collect_profile(
            session.model,
            session.topology_now(),
            self._batches,
            set(wanted),
            run_length=run_length,
            skip_blocks=session.dropped_blocks,
            skip_layers=session.dropped_layers,
            # Ranks would each need their own.
            resumable=None if work is None or is_distributed() else work.passes.next(self._place(), about),
        )

    def _kept_decision(self, kind: type[Report], decide: Callable[[], Report]) -> Report:
        """What this modifier decides; an interrupted run has decided it before."""
        work = current_work()
        if work is None or is_distributed():
            return decide()
        return work.decided(self._place(), kind, decide)

    def _place(self) -> str:
        """A file name for this modifier of the recipe."""
        return f"{len(modifiers_before(self)):02d}-{type(self).__name__}"

    def _report_heading(self, profile: Profile | None) -> dict[str, Any]:
        """The fields that every report has."""
        topology = self._session.topology
        return {
            "modifier": type(self).__name__,
            "base_model": str(self._session.model.config._name_or_path or ""),
            "model_type": topology.model_type,
            "num_blocks": len(topology.blocks),
            "num_experts": {index: moe.num_experts for index, moe in topology.moe_layers.items()},
            "settings": self._settings(),
            "calibration": {"tokens": profile.num_tokens, "samples": profile.num_samples}
            if profile
            else None,
        }

    def _publish(self, report: ModifierReport) -> None:
        """Write the report where the recipe asks for it, and add it to what the checkpoint will say of itself."""
        if self.report_path and is_source_process():
            report.save(self.report_path)
        model = self._session.model
        model._trim_history = [*getattr(model, "_trim_history", []), report]

    def _load_report(self, kind: type[Report]) -> Report:
        """The saved plan.

        :raises PlanFileError: it cannot be read, or was made by another modifier or for another model
        """
        topology = self._session.topology
        report = kind.load(self.plan_path)
        report.check_fits(
            type(self).__name__,
            topology.model_type,
            len(topology.blocks),
            {index: moe.num_experts for index, moe in topology.moe_layers.items()},
        )
        return report


def recipe_modifiers() -> list[Modifier]:
    """All modifiers of the recipe that runs."""
    return list(active_session().lifecycle.recipe.modifiers)


def modifiers_after(modifier: Modifier) -> list[Modifier]:
    """The modifiers that come after this one in the recipe."""
    modifiers = recipe_modifiers()
    position = next((index for index, other in enumerate(modifiers) if other is modifier), len(modifiers))
    return modifiers[position + 1 :]


def modifiers_before(modifier: Modifier) -> list[Modifier]:
    """The modifiers that come before this one in the recipe."""
    return list(itertools.takewhile(lambda other: other is not modifier, recipe_modifiers()))


def _ours(modifier: MoEModifier) -> list[MoEModifier]:
    ours = [other for other in recipe_modifiers() if isinstance(other, MoEModifier)]
    return ours if any(other is modifier for other in ours) else [modifier]


def _check_writable(report_path: str | None) -> None:
    if report_path is None:
        return
    path = Path(report_path)
    try:
        if path.exists():
            with path.open("a"):
                pass
        else:
            # Nothing is made before there is a report: a recipe that is refused leaves nothing behind.
            with tempfile.TemporaryFile(dir=next(parent for parent in path.parents if parent.exists())):
                pass
    except OSError as error:
        raise ValueError(f"report_path={report_path!r} cannot be written: {error}.") from error
