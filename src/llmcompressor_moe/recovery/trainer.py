"""transformers' Trainer with a teacher, a session of llm-compressor, and a log that survives interruption."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import reduce
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from llmcompressor_moe.checkpoint.files import write_text
from llmcompressor_moe.compat.transformers.trainer import SteppedTrainer
from llmcompressor_moe.evaluation.likelihood import mean_negative_log_likelihood
from llmcompressor_moe.recovery.data import RecoveryRows, RowStream
from llmcompressor_moe.recovery.lifecycle import SessionCallback
from llmcompressor_moe.recovery.objective import Objective
from llmcompressor_moe.recovery.progress import LogEntry, Progress
from llmcompressor_moe.recovery.settings import RecoverySettings
from llmcompressor_moe.recovery.teacher import CachedTeacher, LiveTeacher, TeacherSignals

__all__ = [
    "RecoveryTrainer",
    "TrainingDivergedError",
    "last_checkpoint",
    "ranks_nll",
    "read_progress",
    "training_arguments",
]

_WEIGHTS = "weights.safetensors"
# Written last: a checkpoint without it was interrupted.
_PROGRESS = "progress.json"


class TrainingDivergedError(FloatingPointError):
    """A loss or a gradient is no number any more; names the step."""


class _StudentLoss(nn.Module):
    """A student and what it is judged by, as one module.

    Ranks average the gradients of what a module's output depends on. The losses are the output here, so that is
    exactly the parameters that a loss reaches, be it through logits or through a router in the middle.
    """

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self._objective = objective

    def forward(self, batch: dict[str, Tensor], signals: TeacherSignals) -> tuple[Tensor, dict[str, Tensor]]:
        found = self._objective(self.student, batch, signals)
        return found.total, {name: part.detach() for name, part in found.parts.items()}


class _Meter:
    """Means since they were last read, on the device: reading is what waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def read(self) -> dict[str, float]:
        """Means over micro-batches and ranks."""
        if not self._sums:
            return {}
        means = reduce(torch.stack(list(self._sums.values())) / self._count, "mean").tolist()
        names = list(self._sums)
        self._sums, self._count = {}, 0
        return dict(zip(names, means, strict=True))


class RecoveryTrainer(SteppedTrainer):
    """Trains a student towards a teacher.

    Checkpoints hold what trains, the optimizer, schedule, random numbers and the log; a run that goes on from one
    ends as it would have without the interruption.

    :param student: a transformers model or peft's wrapper, whose parameters that train are marked
    :param objective: from student, batch and the teacher's signals to the losses
    :param teacher: None where no loss needs one
    :param rows: to train and to measure on
    :param session: llm-compressor's modifiers, if there are any
    :param progress: the log so far
    :param whole: keep all tensors of the student in checkpoints, because more than what trains changes
    :param report: told every entry of the log, on the first rank
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        teacher: LiveTeacher | CachedTeacher | None,
        rows: RecoveryRows,
        settings: RecoverySettings,
        arguments: TrainingArguments,
        *,
        session: SessionCallback | None,
        progress: Progress,
        whole: bool,
        report: Callable[[LogEntry], None],
    ) -> None:
        stream = RowStream(
            rows.train,
            arguments.max_steps * settings.rows_per_step(arguments.world_size),
            settings.seed,
        )
        self.student = student
        self.progress = progress
        self._settings, self._teacher, self._rows, self._session = settings, teacher, rows, session
        self._report = report
        # Not the masks, which modifiers add while they train and make anew.
        self._kept = (
            None
            if not whole
            else {name for name, _ in [*student.named_parameters(), *student.named_buffers()]}
        )
        self._meter, self._step_loss = _Meter(), None
        self._learning_rate, self._gradient_norm = 0.0, None
        self._started, self._seconds_before = 0.0, 0.0
        super().__init__(
            model=_StudentLoss(student, objective),
            args=arguments,
            train_dataset=stream,
            data_collator=default_collate,
            # The session first, so that what is measured is what its modifiers leave.
            callbacks=[*([session] if session else []), _StepCallback(self)],
        )
        self.remove_callback(PrinterCallback)
        # A mean over the batch, to be divided by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The weighted sum of the losses of one batch."""
        signals = TeacherSignals()
        if self._teacher is not None:
            with self.accelerator.autocast():
                signals = self._teacher.signals(inputs)
        loss, parts = model(inputs, signals)
        self._meter.add({"loss": loss, **parts})
        detached = loss.detach()
        self._step_loss = detached if self._step_loss is None else self._step_loss + detached
        if self._session is not None:
            self._session.loss_calculated(loss)
        return loss

    def gradient_clipped(self, norm: Tensor) -> None:
        """Refuse what is no number, and keep the norm for the log."""
        self._refuse_nonsense(norm)
        self._gradient_norm = norm

    def _refuse_nonsense(self, norm: Tensor) -> None:
        """Before the optimizer moves anything. All ranks agree, so that none waits for another one."""
        finite = self._step_loss.isfinite()
        if self.args.world_size > 1:
            finite = reduce(finite.float(), "sum") == self.args.world_size
        # With float16 the scaler itself looks for gradients that overflowed, and leaves the step out.
        overflowed = self.accelerator.scaler is None and not math.isfinite(norm)
        if finite and not overflowed:
            return
        what = "the gradient" if finite else "the loss"
        means = ", ".join(f"{name} {value:.4g}" for name, value in self._meter.read().items())
        saved = last_checkpoint(self.args.output_dir)
        kept = (
            "no checkpoint was written before it"
            if saved is None
            else f"the checkpoint of step {_step_of(saved)} is kept in {str(saved)!r}"
        )
        raise TrainingDivergedError(
            f"Step {self.state.global_step + 1}: {what} is NaN or infinite ({means}); {kept}. Lower the learning "
            f"rate (learning_rate={self._settings.learning_rate:g}) and resume, or start again in another dtype; "
            "if it was the first step, a model gives NaN already."
        )

    def start(self) -> None:
        """Note where the clock stands, and measure the student where that was not done before."""
        self._started, self._seconds_before = time.perf_counter(), self.progress.seconds
        if self.progress.start_nll is None:
            self._log(0, heldout=True)

    def step_begins(self) -> None:
        """Forget the loss of the step before."""
        self._step_loss = None

    def step_about_to_end(self) -> None:
        """The schedule moves on at once."""
        self._learning_rate = self.current_learning_rate

    def step_ended(self) -> None:
        """Log and measure where it is time to."""
        step, last = self.state.global_step, self.state.global_step == self.args.max_steps
        heldout = last or step % every(self._settings.evaluate_every, self.args.max_steps) == 0
        if heldout or step % self._settings.log_every == 0:
            self._log(step, heldout)

    def _log(self, step: int, heldout: bool) -> None:
        means = self._meter.read()
        entry = LogEntry(
            step=step,
            tokens=step * self._settings.rows_per_step(self.args.world_size) * self._settings.length,
            seconds=self._seconds_before + time.perf_counter() - self._started,
            loss=means.pop("loss", None),
            parts=means,
            learning_rate=self._learning_rate if step else None,
            gradient_norm=float(self._gradient_norm) if self._gradient_norm is not None else None,
            heldout_nll=self._heldout_nll() if heldout else None,
        )
        self.progress.add(entry)
        if self.args.should_save:
            self.progress.write_log(self.args.output_dir)
            self._report(entry)

    def _heldout_nll(self) -> float:
        with self.accelerator.autocast():
            return ranks_nll(self.student, self._rows.heldout, self._settings.batch_size)

    def training_prepared(self) -> None:
        """Modifiers look for modules by the names that the student knows them by."""
        self.callback_handler.model = self.student

    def _state(self) -> dict[str, Tensor]:
        if self._kept is None:
            return {
                name: value.detach() for name, value in self.student.named_parameters() if value.requires_grad
            }
        every = dict([*self.student.named_parameters(), *self.student.named_buffers()])
        return {name: every[name].detach() for name in sorted(self._kept)}

    def save_weights(self, directory: Path) -> None:
        """Write what trains, or all, by the names of this model's modules, so that it is found again."""
        tensors = {name: value.clone().contiguous() for name, value in self._state().items()}
        save_file(tensors, directory / _WEIGHTS)

    def load_weights(self, checkpoint: str) -> None:
        """Read what `save_weights` wrote.

        :raises ValueError: it is of another run
        """
        saved, here = load_file(Path(checkpoint) / _WEIGHTS), self._state()
        differing = sorted(saved.keys() ^ here.keys())
        if differing:
            raise ValueError(
                f"checkpoint {checkpoint!r} is of another run: {differing[0]!r} is only in one of the "
                "two; start again in another output directory."
            )
        with torch.no_grad():
            for name, value in here.items():
                value.copy_(saved[name])

    def schedule_loaded(self) -> None:
        """A run may go on at another rate, but the state that was saved brings its own."""
        rate = self._settings.learning_rate
        self.lr_scheduler.base_lrs = [rate] * len(self.lr_scheduler.base_lrs)
        for group, factor in zip(self.optimizer.param_groups, self.lr_scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(self.lr_scheduler.last_epoch)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def checkpoint_saved(self) -> None:
        """Add the log, and remove the oldest."""
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        directory = Path(self.args.output_dir)
        write_text(
            directory / f"checkpoint-{self.state.global_step}" / _PROGRESS, self.progress.model_dump_json()
        )
        for old in _complete_checkpoints(directory)[: -self._settings.keep_checkpoints]:
            (old / _PROGRESS).unlink()
            shutil.rmtree(old, ignore_errors=True)


class _StepCallback(TrainerCallback):
    """Passes on what the trainer tells callbacks only."""

    def __init__(self, trainer: RecoveryTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *arguments: Any, **found: Any) -> None:
        self._trainer.start()

    def on_step_begin(self, *arguments: Any, **found: Any) -> None:
        self._trainer.step_begins()

    def on_pre_optimizer_step(self, *arguments: Any, **found: Any) -> None:
        self._trainer.step_about_to_end()

    def on_step_end(self, *arguments: Any, **found: Any) -> None:
        self._trainer.step_ended()


def training_arguments(settings: RecoverySettings, directory: Path, steps: int) -> TrainingArguments:
    """What transformers' Trainer is told.

    :param directory: for checkpoints
    :param steps: optimizer steps
    """
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        # The first step of a warm-up changes nothing, and must not be the only one.
        warmup_steps=min(math.ceil(settings.warmup * steps), steps - 1),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        seed=settings.seed,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        use_cpu=settings.use_cpu or not torch.accelerator.is_available(),
        # The rows come in their order already.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        # An expert that no token was routed to has no gradient.
        ddp_find_unused_parameters=True,
        save_strategy="steps",
        save_steps=every(settings.save_every, steps),
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available() and not settings.use_cpu,
    )


def every(asked: int | None, steps: int) -> int:
    """Steps between two of something: as asked, or ten times in all."""
    return asked or max(1, math.ceil(steps / 10))


def last_checkpoint(directory: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return next(reversed(_complete_checkpoints(Path(directory))), None)


def read_progress(checkpoint: Path) -> Progress:
    """The log up to a checkpoint."""
    return Progress.model_validate_json((checkpoint / _PROGRESS).read_text())


def ranks_nll(model: nn.Module, rows: Tensor, batch_size: int) -> float:
    """Mean nats per predicted token of rows of one length, which ranks share among them.

    :raises FloatingPointError: logits are NaN or infinite
    """
    state = PartialState()
    ours = rows[state.process_index :: state.num_processes]
    total = mean_negative_log_likelihood(model, ours, batch_size) * len(ours) if len(ours) else 0.0
    return float(reduce(torch.tensor(total, device=state.device, dtype=torch.float64), "sum")) / len(rows)


def _complete_checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path.parent for path in directory.glob(f"checkpoint-*/{_PROGRESS}")), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
