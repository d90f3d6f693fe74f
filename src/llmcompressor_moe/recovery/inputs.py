"""Everything that can be wrong with a recovery, found before any weights are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmcompressor_moe.check.config import ReadConfig
from llmcompressor_moe.check.expected import lay_out
from llmcompressor_moe.check.weights import require_weights
from llmcompressor_moe.checkpoint.atomic import check_can_write
from llmcompressor_moe.checkpoint.fingerprint import fingerprint
from llmcompressor_moe.evaluation.agreement import require_same_vocabulary
from llmcompressor_moe.evaluation.history import ModelLayout, read_history
from llmcompressor_moe.evaluation.windows import position_limit, vocabulary_size
from llmcompressor_moe.inspection import read_config
from llmcompressor_moe.loading import load_tokenizer
from llmcompressor_moe.recovery.alignment import Alignment, align, layout_for_alignment
from llmcompressor_moe.recovery.cache import check_cache_target, has_cache, open_cache
from llmcompressor_moe.recovery.data import RecoveryRows, recovery_rows, rows_digest
from llmcompressor_moe.recovery.lifecycle import training_modifiers
from llmcompressor_moe.recovery.settings import RecoverySettings

__all__ = ["RecoveryInputs", "check_inputs", "require_same_tokenizer", "training_directory"]

# Rows taken of a dataset that is fetched, where nobody said how many steps there are.
_ROWS_OF_DATASETS = 10_000
# How much text two tokenizers have to encode alike.
_PROBE_ROWS = 8
# What a run may be resumed with another value of: nothing that was done already depends on it.
_MAY_CHANGE = ("learning_rate", "max_gradient_norm", "log_every", "save_every", "keep_checkpoints", "use_cpu")


@dataclass(frozen=True)
class RecoveryInputs:
    """What a recovery works on.

    :param rows: token ids
    :param alignment: None where no loss compares parts
    :param ranks: processes that train together
    :param steps: optimizer steps
    :param identity: what makes a run this run, for those who want to go on with one
    """

    rows: RecoveryRows
    alignment: Alignment | None
    ranks: int
    steps: int
    identity: dict[str, Any]


def training_directory(output: str | Path) -> Path:
    """Where checkpoints and log of a training are kept while it lasts."""
    output = Path(output)
    return output.with_name(f"{output.name}.training")


def check_inputs(
    student: str | Path, output: str | Path, teacher: str | Path | None, settings: RecoverySettings
) -> RecoveryInputs:
    """Look at configs, headers, tokenizers, text and recipe.

    :raises ValueError: something does not fit; names it, and what would
    :raises OutputDirectoryError: the output cannot be written
    """
    _check_places(student, output, teacher, settings)
    _check_machine(settings)
    if settings.recipe is not None:
        training_modifiers(settings.recipe)
    configs = {}
    for path in (student, *([teacher] if teacher is not None else [])):
        configs[path] = read_config(path)
        require_weights(path)
    alignment = None
    if teacher is not None:
        require_same_vocabulary(*(vocabulary_size(configs[path].parsed) for path in (teacher, student)))
        if settings.weights.of_parts:
            alignment = align(
                *(_layout(configs[path]) for path in (student, teacher)),
                *(read_history(path) for path in (student, teacher)),
            )
            settings.weights.check_alignment(alignment)
    _check_length(configs[student], settings)
    tokenizer = load_tokenizer(student)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rows = _rows(settings, tokenizer, ranks)
    _check_rows(rows, configs[student], settings, ranks)
    if teacher is not None:
        require_same_tokenizer(student, tokenizer, teacher, rows.train[:_PROBE_ROWS])
    if settings.cache is not None and has_cache(settings.cache):
        open_cache(settings.cache, rows.train, teacher, settings.weights.temperature)
    steps = settings.steps_for(len(rows.train), ranks)
    return RecoveryInputs(
        rows, alignment, ranks, steps, _identity(student, teacher, settings, rows, ranks, steps)
    )


def require_same_tokenizer(
    student: str | Path, tokenizer: PreTrainedTokenizerBase, teacher: str | Path, probe: torch.Tensor
) -> None:
    """Refuse a teacher that means other tokens by the same ids.

    :param tokenizer: the student's
    :param probe: [rows, length] token ids of text that both have to encode alike
    :raises ValueError: it does; names a token
    """
    theirs = load_tokenizer(teacher)
    ours, other = tokenizer.get_vocab(), theirs.get_vocab()
    problem = None
    if ours != other:
        token = min(
            (token for token in ours.keys() | other.keys() if ours.get(token) != other.get(token)), key=str
        )
        problem = f"{token!r} is {_id(ours, token)} of the student and {_id(other, token)} of the teacher"
    else:
        for text in tokenizer.batch_decode(probe):
            if tokenizer(text, verbose=False)["input_ids"] != theirs(text, verbose=False)["input_ids"]:
                problem = f"the two cut {text[:40]!r} into different tokens"
                break
    if problem is not None:
        raise ValueError(
            f"teacher {str(teacher)!r} has another tokenizer than the student {str(student)!r}: {problem}. A "
            "teacher must predict the tokens that the student predicts; name the model that the student was made "
            "from."
        )


def _id(vocabulary: dict[str, int], token: str) -> str:
    return f"token {vocabulary[token]}" if token in vocabulary else "no token"


def _check_places(
    student: str | Path, output: str | Path, teacher: str | Path | None, settings: RecoverySettings
) -> None:
    if teacher is None and settings.weights.of_teacher:
        raise ValueError(
            f"{' and '.join(settings.weights.of_teacher)}: a teacher to compare with is missing; name the model "
            "that the student was made from as teacher, or train on next_token alone."
        )
    if settings.cache is not None and teacher is None:
        raise ValueError(f"cache={str(settings.cache)!r} is of a teacher, and there is none; name one.")
    real = Path(output).resolve()
    places = {"the student itself": student, "the teacher": teacher, "the cache": settings.cache}
    for what, path in places.items():
        if path is not None and Path(path).resolve() == real:
            raise ValueError(f"output={str(output)!r} is {what}; name another directory.")
    if settings.cache is not None and Path(settings.cache).resolve() in (
        Path(path).resolve() for path in (student, teacher)
    ):
        raise ValueError(f"cache={str(settings.cache)!r} is a model's directory; name another one.")
    if settings.cache is not None:
        check_cache_target(settings.cache)
    check_can_write(output)
    check_can_write(training_directory(output))


def _check_machine(settings: RecoverySettings) -> None:
    for variable, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise ValueError(
                f"{variable} is set, but ranks that share a model ({what}) are not supported: every rank needs "
                "the whole student. Use ranks that share data (torchrun, or accelerate with MULTI_GPU)."
            )
    if settings.precision == "fp16" and (settings.use_cpu or not torch.accelerator.is_available()):
        raise ValueError("precision='fp16' needs an accelerator; on a CPU use bf16, or none.")


def _layout(config: ReadConfig) -> ModelLayout:
    return layout_for_alignment(lay_out(config).model)


def _check_length(config: ReadConfig, settings: RecoverySettings) -> None:
    limit = position_limit(config.parsed)
    if limit is not None and settings.length > limit:
        raise ValueError(
            f"length={settings.length}, but the student has {limit} positions (max_position_embeddings); give at "
            "most that."
        )


def _rows(settings: RecoverySettings, tokenizer: PreTrainedTokenizerBase, ranks: int) -> RecoveryRows:
    return recovery_rows(
        settings.data,
        settings.heldout,
        tokenizer,
        length=settings.length,
        wanted_rows=settings.steps * settings.rows_per_step(ranks) if settings.steps else _ROWS_OF_DATASETS,
        heldout_share=settings.heldout_share,
        max_heldout_tokens=settings.max_heldout_tokens,
    )


def _check_rows(rows: RecoveryRows, config: ReadConfig, settings: RecoverySettings, ranks: int) -> None:
    vocabulary = vocabulary_size(config.parsed)
    highest = int(max(rows.train.max(), rows.heldout.max()))
    if vocabulary is not None and highest >= vocabulary:
        raise ValueError(
            f"data={settings.data!r} has the token {highest}, which is not in the student's vocabulary of "
            f"{vocabulary}; use the student's own tokenizer."
        )
    wanted = settings.rows_per_step(ranks)
    if len(rows.train) < wanted:
        raise ValueError(
            f"data={settings.data!r} gives {len(rows.train)} rows of {settings.length} tokens to train on, and "
            f"one step takes {wanted} (batch_size={settings.batch_size} x accumulate={settings.accumulate} x "
            f"{ranks} ranks); give more text, or lower batch_size, accumulate or length."
        )


def _identity(
    student: str | Path,
    teacher: str | Path | None,
    settings: RecoverySettings,
    rows: RecoveryRows,
    ranks: int,
    steps: int,
) -> dict[str, Any]:
    return {
        "student": fingerprint(student),
        "teacher": None if teacher is None else fingerprint(teacher),
        "text": rows_digest(rows.train),
        "held-out text": rows_digest(rows.heldout),
        "recipe": None if settings.recipe is None else settings.recipe.read_text(encoding="utf-8"),
        "ranks": ranks,
        "steps": steps,
        **settings.model_dump(
            mode="json", exclude={*_MAY_CHANGE, "recipe", "data", "heldout", "steps", "cache"}
        ),
        "cached": settings.cache is not None,
    }
