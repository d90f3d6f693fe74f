"""From a student and its teacher to a student that lost less."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from llmcompressor_moe.checkpoint.atomic import atomic_directory
from llmcompressor_moe.checkpoint.files import write_text
from llmcompressor_moe.compat.transformers.models import can_choose_experts
from llmcompressor_moe.evaluation.recovered import RECOVERY_FILE
from llmcompressor_moe.loading import load_decompressed, open_as_served
from llmcompressor_moe.recovery.adapters import inner_model, student_topology
from llmcompressor_moe.recovery.cache import has_cache, open_cache, write_cache
from llmcompressor_moe.recovery.data import rows_digest
from llmcompressor_moe.recovery.fake_quantization import has_quantized_modules
from llmcompressor_moe.recovery.inputs import RecoveryInputs, check_inputs, training_directory
from llmcompressor_moe.recovery.lifecycle import (
    SessionCallback,
    constant_masks,
    sparse_linears,
    training_modifiers,
)
from llmcompressor_moe.recovery.lora import LoraSettings, add_lora, merge_lora
from llmcompressor_moe.recovery.objective import Objective
from llmcompressor_moe.recovery.parameters import select
from llmcompressor_moe.recovery.plots import PLOT_FILE, curves_png
from llmcompressor_moe.recovery.progress import LogEntry, Progress, gap_closed
from llmcompressor_moe.recovery.settings import LORA, RecoverySettings
from llmcompressor_moe.recovery.students import load_student, save_student
from llmcompressor_moe.recovery.teacher import CachedTeacher, LiveTeacher
from llmcompressor_moe.recovery.trainer import (
    RecoveryTrainer,
    last_checkpoint,
    ranks_nll,
    read_progress,
    training_arguments,
)
from llmcompressor_moe.report import ShownPath

__all__ = ["RecoveryReport", "recover"]

_RUN_FILE = "run.json"
_CARD = "README.md"
# Dimensions of a fused module's weights: experts, rows, columns.
_FUSED = 3
_PRUNED_SHARE = 0.01


class RecoveryReport(BaseModel):
    """What a recovery did; ``recovery.json`` beside the weights.

    :param ranks: processes that trained together
    :param trained_parameters: values that trained
    :param total_parameters: of the student, adapters left out
    :param moe_layers: of the student; 0 for a dense one
    :param train_rows: rows of ``settings.length`` tokens there were to train on
    :param tokens: tokens trained on
    :param start_nll: nats per held-out token of the student before; in the dtype of training, as all of these
    :param end_nll: of the student after
    :param teacher_nll: of the teacher; None without one
    :param gap_closed: see `progress.gap_closed`
    :param log: everything that was logged
    """

    student: ShownPath
    teacher: ShownPath | None
    output: ShownPath
    settings: RecoverySettings
    ranks: int
    trained_parameters: int
    total_parameters: int
    moe_layers: int
    train_rows: int
    heldout_rows: int
    steps: int
    tokens: int
    seconds: float
    start_nll: float
    end_nll: float
    teacher_nll: float | None
    gap_closed: float | None
    log: list[LogEntry]

    def describe(self) -> str:
        """One line for the model card."""
        closed = (
            "" if self.gap_closed is None else f", {self.gap_closed:.0%} of the gap to the teacher closed"
        )
        teacher = "" if self.teacher is None else f" with `{Path(self.teacher).name}` as teacher"
        return (
            f"Trained {' and '.join(self.settings.train)} on {self.tokens:,} tokens{teacher} "
            f"({', '.join(self.settings.weights.used)}): {self.start_nll:.4f} to {self.end_nll:.4f} nats per "
            f"held-out token{closed}."
        )


def recover(
    student: str | Path,
    output: str | Path,
    *,
    teacher: str | Path | None = None,
    settings: RecoverySettings | None = None,
    resume: bool = False,
    announce: Callable[[str], None] = lambda step: None,
    report: Callable[[LogEntry], None] = lambda entry: None,
) -> RecoveryReport:
    """Train a compressed model, and write what it becomes as a checkpoint of the same kind.

    Everything that can be wrong without weights is found before they are read. While it trains, checkpoints and
    log are in ``OUTPUT.training``, which goes when ``output`` is written. Several ranks (torchrun, accelerate)
    share the rows of a step; each has to call this.

    :param student: directory of the model
    :param output: directory to write; an earlier checkpoint there is replaced at the very end
    :param teacher: directory of the model it was made from; None if no loss needs one
    :param resume: go on from ``OUTPUT.training``, if there is one; the end is that of a run without interruption
    :param announce: told what is being done, step by step, on the first rank
    :param report: told each line of the log as it is written, on the first rank
    :raises ValueError: something is wrong with an argument, a model, the text or the recipe; says what would work
    :raises OutputDirectoryError: the output cannot be written; it is as it was
    :raises TrainingDivergedError: a loss became NaN; names the step, checkpoints before it are kept
    :raises IllegalCheckpointError: the result would not be legal to serve; ``output`` is as it was
    """
    settings = settings or RecoverySettings()
    inputs = check_inputs(student, output, teacher, settings)
    directory = training_directory(output)
    checkpoint = _checkpoint_to_resume(directory, inputs.identity, resume)
    arguments = training_arguments(settings, directory, inputs.steps)
    state = PartialState()
    if not state.is_main_process:
        announce = report = _silent
    if checkpoint is not None:
        announce(f"Going on from {checkpoint}")
        progress = read_progress(checkpoint)
    else:
        progress = Progress()
        if state.is_main_process:
            shutil.rmtree(directory, ignore_errors=True)
            write_text(directory / _RUN_FILE, json.dumps(inputs.identity, indent=1) + "\n")
    state.wait_for_everyone()
    signals = None
    if teacher is not None:
        signals = _teacher(teacher, settings, inputs, progress, arguments, announce)
    announce("Loading the student")
    set_seed(settings.seed)
    model, session = _student(student, settings, arguments.device)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    total = sum(value.numel() for value in model.parameters())
    trainer = RecoveryTrainer(
        model,
        Objective(settings.weights, inputs.alignment),
        signals if settings.weights.of_teacher else None,
        inputs.rows,
        settings,
        arguments,
        session=session,
        progress=progress,
        whole=session is not None,
        report=report,
    )
    announce(f"Training {trained:,} parameters for {inputs.steps} steps")
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        if session is not None:
            session.close()
    merged = merge_lora(model) if LORA in settings.train else model
    found = RecoveryReport(
        student=str(student),
        teacher=None if teacher is None else str(teacher),
        output=str(output),
        settings=settings,
        ranks=inputs.ranks,
        trained_parameters=trained,
        total_parameters=sum(value.numel() for value in merged.parameters())
        if merged is not model
        else total,
        moe_layers=len(student_topology(inner_model(merged)).moe_layers),
        train_rows=len(inputs.rows.train),
        heldout_rows=len(inputs.rows.heldout),
        steps=inputs.steps,
        tokens=progress.entries[-1].tokens,
        seconds=progress.seconds,
        start_nll=progress.start_nll,
        end_nll=progress.last_nll,
        teacher_nll=progress.teacher_nll,
        gap_closed=gap_closed(progress.start_nll, progress.last_nll, progress.teacher_nll),
        log=progress.entries,
    )
    announce(f"Saving to {output}")
    trainer.accelerator.free_memory()
    _save(merged, Path(output), student, found, progress, state)
    if state.is_main_process:
        shutil.rmtree(directory, ignore_errors=True)
    return found


def _silent(_: Any) -> None:
    """Only the first rank talks."""


def _checkpoint_to_resume(directory: Path, identity: dict[str, Any], resume: bool) -> Path | None:
    """Where to go on; None: at the beginning.

    :raises ValueError: there is a training that nobody wanted to resume, or another one
    """
    if not (directory / _RUN_FILE).exists():
        if directory.exists() and any(directory.iterdir()):
            raise ValueError(
                f"{str(directory)!r} is where checkpoints would go, and holds files of something else; move "
                "them, or name another output."
            )
        return None
    checkpoint = last_checkpoint(directory)
    if checkpoint is None:
        return None
    if not resume:
        raise ValueError(
            f"{str(directory)!r} holds an interrupted training, up to {checkpoint.name}; resume it (`--resume`), "
            "or delete the directory to start over."
        )
    try:
        before = json.loads((directory / _RUN_FILE).read_text())
    except ValueError as error:
        raise ValueError(
            f"{directory / _RUN_FILE} is not JSON ({error}); delete the directory to start over."
        ) from error
    differing = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
    if differing:
        raise ValueError(
            f"{str(directory)!r} is a training with other settings, text or models ({', '.join(differing)} "
            "differ); resume it with those it began with, name another output, or delete the directory to start "
            "over."
        )
    return checkpoint


def _teacher(
    path: str | Path,
    settings: RecoverySettings,
    inputs: RecoveryInputs,
    progress: Progress,
    arguments: TrainingArguments,
    announce: Callable[[str], None],
) -> LiveTeacher | CachedTeacher:
    """What the student learns from; the teacher's likelihood of held-out text goes into the log.

    A teacher that runs beside the student is loaded. One whose logits are cached is only opened, and runs block by
    block.
    """
    state = PartialState()
    rows, heldout = inputs.rows.train, inputs.rows.heldout
    if settings.cache is None:
        announce("Loading the teacher")
        model = _loaded_teacher(path, settings, arguments)
        if progress.teacher_nll is None:
            progress.teacher_nll = ranks_nll(model, heldout, settings.batch_size)
        return LiveTeacher(model, settings.weights, inputs.alignment)
    measured = settings.cache.with_name(f"{settings.cache.name}.heldout-{rows_digest(heldout)[:16]}.json")
    written = has_cache(settings.cache)
    if not written or not measured.exists():
        announce("Opening the teacher")
        model = open_as_served(path, settings.teacher_dtype, arguments.device)
        nll = ranks_nll(model, heldout, settings.batch_size)
        if state.is_main_process:
            if not written:
                announce(f"Writing the teacher's logits to {settings.cache}")
                write_cache(
                    model,
                    rows,
                    settings.cache,
                    settings.cache_top,
                    settings.batch_size,
                    temperature=settings.weights.temperature,
                    teacher=path,
                )
            write_text(measured, json.dumps({"teacher_nll": nll}))
        state.wait_for_everyone()
        del model
        gc.collect()
    progress.teacher_nll = json.loads(measured.read_text())["teacher_nll"]
    return CachedTeacher(open_cache(settings.cache, rows, path, settings.weights.temperature))


def _loaded_teacher(
    path: str | Path, settings: RecoverySettings, arguments: TrainingArguments
) -> PreTrainedModel:
    model = load_decompressed(path, settings.teacher_dtype)
    _fast_experts(model, arguments.device)
    return nn.Module.to(model, arguments.device).eval()


def _student(
    path: str | Path, settings: RecoverySettings, device: torch.device
) -> tuple[nn.Module, SessionCallback | None]:
    """The student, what trains of it marked, and the modifiers that work while it does."""
    modifiers = training_modifiers(settings.recipe) if settings.recipe is not None else []
    model = load_student(path, settings.dtype, linear_experts=bool(modifiers))
    names = [name for name in settings.train if name != LORA]
    select(model, names) if names else model.requires_grad_(False)
    if settings.keep_zeros and not has_quantized_modules(model):
        pruned = _pruned(model)
        if pruned and LORA in settings.train:
            raise ValueError(
                f"train={list(settings.train)}: the student is pruned ({pruned[0]} for one), and adapters would "
                "fill its zeros when they are added to its weights; train weights themselves, or give up the "
                "zeros with keep_zeros=False."
            )
        if any(model.get_parameter(name).requires_grad for name in pruned):
            if not modifiers:
                del model
                gc.collect()
                model = load_student(path, settings.dtype, linear_experts=True)
                select(model, names)
            modifiers = [*modifiers, *constant_masks(model)]
    if LORA in settings.train:
        model = add_lora(model, settings.lora or LoraSettings())
        select(model, settings.train)
    _fast_experts(model, device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, SessionCallback(modifiers) if modifiers else None


def _pruned(model: PreTrainedModel) -> list[str]:
    """Parameters with more zeros than weights have by chance."""
    linears = [f"{path}.weight" for path in sparse_linears(model)]
    fused = [name for name, value in model.named_parameters() if value.ndim == _FUSED and _has_zeros(value)]
    return linears + fused


def _has_zeros(value: torch.Tensor) -> bool:
    return int((value == 0).sum()) >= _PRUNED_SHARE * value.numel()


def _fast_experts(model: nn.Module, device: torch.device) -> None:
    """On a CPU one matrix product per expert and projection is faster than transformers' grouped one."""
    inner = inner_model(model)
    if device.type == "cpu" and can_choose_experts(inner):
        inner.set_experts_implementation("eager")


def _save(
    model: PreTrainedModel,
    output: Path,
    student: str | Path,
    found: RecoveryReport,
    progress: Progress,
    state: PartialState,
) -> None:
    if not state.is_main_process:
        save_student(model, output, student)
        state.wait_for_everyone()
        return
    with atomic_directory(output) as written:
        save_student(model, written, student)
        (written / RECOVERY_FILE).write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
        plot = curves_png(progress)
        if plot is not None:
            (written / PLOT_FILE).write_bytes(plot)
        card = written / _CARD
        if card.exists():
            text = card.read_text(encoding="utf-8")
            picture = "" if plot is None else f"\n![curves]({PLOT_FILE})\n"
            told = f"{found.describe()} `{RECOVERY_FILE}` holds settings and curve.\n{picture}"
            card.write_text(f"{text}\n## Recovery\n\n{told}", encoding="utf-8")
    state.wait_for_everyone()
