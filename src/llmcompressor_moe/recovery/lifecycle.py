"""Drive llm-compressor's session from transformers' Trainer, so that modifiers which work while a model trains
(constant masks, magnitude schedules) do so again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llmcompressor.core.events import EventType
from llmcompressor.core.session import CompressionSession
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import ConstantPruningModifier
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmcompressor_moe.compat.llmcompressor.training import active, training_session
from llmcompressor_moe.recipe_file import RecipeError, read_recipe

__all__ = ["SCHEDULES", "SessionCallback", "constant_masks", "sparse_linears", "training_modifiers"]

SCHEDULES = ("steps", "epochs")
"""What ``start`` and ``end`` of a recipe's modifiers count."""

_CALIBRATION_EVENTS = ("on_calibration_start", "on_sequential_epoch_end", "on_calibration_end")
_TRAINING_EVENTS = ("on_event", "on_update")


def training_modifiers(recipe: str | Path | Sequence[Modifier]) -> list[Modifier]:
    """The modifiers of a recipe, if training events can drive all of them.

    :param recipe: a YAML file, or modifiers
    :raises RecipeError: see `read_recipe`; or a modifier works by calibration, or would never start or end
    """
    modifiers = read_recipe(recipe).modifiers if isinstance(recipe, str | Path) else list(recipe)
    for modifier in modifiers:
        name = type(modifier).__name__
        if modifier.requires_calibration_data or _overrides(modifier, _CALIBRATION_EVENTS):
            raise RecipeError(
                f"recipe: {name} works by calibration, not while a model trains; apply it with `compress` before "
                "or after."
            )
        if not _overrides(modifier, _TRAINING_EVENTS):
            raise RecipeError(f"recipe: {name} does nothing while a model trains; leave it out.")
        if modifier.start is None:
            raise RecipeError(f"recipe: {name}: start is missing, so it would never start; write `start: 0`.")
        if modifier.end is None and hasattr(modifier, "update_scheduler"):
            raise RecipeError(f"recipe: {name}: end is missing; say where its schedule ends.")
    return modifiers


def _overrides(modifier: Modifier, methods: Sequence[str]) -> bool:
    return any(getattr(type(modifier), name) is not getattr(Modifier, name) for name in methods)


def sparse_linears(model: nn.Module, at_least: float = 0.01) -> dict[str, int]:
    """Linears that were pruned: module path -> number of zeros in the weight.

    :param at_least: share of zeros that no dense weight reaches by chance
    """
    zeros = {
        path: int((module.weight == 0).sum())
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return {
        path: count
        for path, count in zeros.items()
        if count >= at_least * model.get_submodule(path).weight.numel()
    }


def constant_masks(model: nn.Module, at_least: float = 0.01) -> list[Modifier]:
    """Modifiers that keep the zeros of a pruned model where they are for a whole training; none for a dense one.

    :param model: with linearized experts, because masks are one per Linear
    :param at_least: see `sparse_linears`
    """
    targets = list(sparse_linears(model, at_least))
    return [ConstantPruningModifier(targets=targets, start=0)] if targets else []


class SessionCallback(TrainerCallback):
    """Drives a session of its own through the events of a training.

    A batch, for the session, is everything between two optimizer steps, however many batches are accumulated. Its
    step is the number of optimizer steps that are done, so ``end: 20`` ends after the twentieth.

    :param recipe: modifiers, see `training_modifiers`
    :param schedule: one of `SCHEDULES`
    :raises RecipeError: see `training_modifiers`
    :raises ValueError: the schedule is unknown
    """

    def __init__(self, recipe: str | Path | Sequence[Modifier], schedule: str = "steps"):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: choose one of {', '.join(SCHEDULES)}.")
        self._recipe = training_modifiers(recipe)
        self._schedule = schedule
        self._session: CompressionSession | None = None
        self._step = 0
        self._in_batch = False

    @property
    def session(self) -> CompressionSession | None:
        """The session while a model trains."""
        return self._session

    def loss_calculated(self, loss: torch.Tensor) -> None:
        """Tell modifiers the loss of a batch; for `compute_loss`. Nothing happens outside of training steps."""
        if self._in_batch:
            self._event(EventType.LOSS_CALCULATED, loss=loss)

    def close(self) -> None:
        """Finalize the session, as the end of a training does; for one that ended early. Does nothing twice."""
        session, self._session, self._in_batch = self._session, None, False
        if session is not None:
            with active(session):
                session.finalize()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Initialize the session with model and optimizer."""
        self.close()
        steps_per_epoch = None
        if self._schedule == "epochs":
            batches = len(kwargs["train_dataloader"])
            steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
        self._session = training_session(steps_per_epoch)
        self._step = state.global_step
        with active(self._session):
            self._session.initialize(
                # Modifiers can be initialized once only, a trainer may train again.
                recipe=copy.deepcopy(self._recipe),
                model=kwargs["model"],
                optimizer=kwargs.get("optimizer"),
                train_data=kwargs.get("train_dataloader"),
                # Upstream copies what it is given unless told not to.
                copy_data=False,
                batches_per_step=args.gradient_accumulation_steps,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first batch of an optimizer step."""
        self._step = state.global_step
        self._event(EventType.BATCH_START)
        self._in_batch = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are complete."""
        self._event(EventType.OPTIM_PRE_STEP)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weights have moved."""
        self._event(EventType.OPTIM_POST_STEP)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step more is done."""
        self._in_batch = False
        self._step = state.global_step
        self._event(EventType.BATCH_END)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finalize the session."""
        self.close()

    def _event(self, kind: EventType, **kwargs: Any) -> None:
        with active(self._session):
            self._session.event(kind, global_step=self._step, **kwargs)
