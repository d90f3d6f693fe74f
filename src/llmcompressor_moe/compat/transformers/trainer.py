"""transformers' Trainer with steps that can be overridden by public names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

__all__ = ["SteppedTrainer"]


class SteppedTrainer(Trainer):
    """A Trainer whose subclasses decide what is saved, and what follows some of its steps.

    Trainer takes callbacks for some steps, but none is given the norm of the gradient before the optimizer moves,
    and none may refuse the step. Checkpoints are whole models under the names of the family's files, which is
    neither what trains nor what a wrapped model can load.
    """

    def gradient_clipped(self, norm: Tensor) -> None:
        """Gradients are complete and clipped; the optimizer has not moved anything."""

    def training_prepared(self) -> None:
        """The model is wrapped, callbacks know it, and a checkpoint, if there is one, is not loaded yet."""

    def save_weights(self, directory: Path) -> None:
        """Write the weights of a checkpoint into a new directory; on the rank that saves."""
        raise NotImplementedError

    def load_weights(self, checkpoint: str) -> None:
        """Read what `save_weights` wrote; on every rank."""
        raise NotImplementedError

    def schedule_loaded(self) -> None:
        """Optimizer and schedule have the state of the checkpoint, if there is one."""

    def checkpoint_saved(self) -> None:
        """A checkpoint is complete but for what the subclass adds; on every rank."""

    @property
    def current_learning_rate(self) -> float:
        """The rate of the step that runs."""
        return self._get_learning_rate()

    # Trainer's own steps.

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        self.gradient_clipped(norm)
        return norm

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments, **options)
        self.training_prepared()
        return prepared

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = Path(output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self.save_weights(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.schedule_loaded()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.checkpoint_saved()
