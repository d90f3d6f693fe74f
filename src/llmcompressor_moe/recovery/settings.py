"""What a recovery is asked for, and what can be said against it before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from llmcompressor_moe.loading import DTYPES
from llmcompressor_moe.recovery.lora import LoraSettings
from llmcompressor_moe.recovery.parameters import check_sets
from llmcompressor_moe.recovery.weights import LossWeights
from llmcompressor_moe.report import ShownPath

__all__ = ["LORA", "RecoverySettings"]

LORA = "lora"
# Float16 loses the small steps of training.
_TRAINING_DTYPES = tuple(name for name in DTYPES if name != "float16")


class RecoverySettings(BaseModel):
    """How a student is trained.

    :param data: text to train on: ``demo`` (the bundled calibration text), a ``.txt`` or ``.jsonl`` file, or a
        saved or named dataset; see `calibration.calibration_samples`
    :param heldout: text to measure on, of the same kinds; None: a share of ``data`` that is not trained on, beside
        the bundled text the bundled held-out text
    :param heldout_share: what share that is
    :param max_heldout_tokens: held-out tokens that are measured, at most (at least one row)
    :param length: tokens per row
    :param weights: of the losses, see `objective.LossWeights`
    :param train: sets of parameters, see `parameters.PARAMETER_SETS`
    :param lora: the adapters of the set ``lora``; None: their defaults
    :param steps: optimizer steps; None: as many as ``epochs`` takes
    :param epochs: how often each row is taken
    :param batch_size: rows per rank and forward
    :param accumulate: forwards per optimizer step
    :param learning_rate: the highest
    :param schedule: how it falls to (nearly) zero after the warm-up
    :param warmup: share of the steps in which it rises
    :param weight_decay: of AdamW, for matrices
    :param max_gradient_norm: gradients are scaled down to this L2 norm
    :param seed: of the order of rows, dropout and new adapters
    :param dtype: of the student's weights while it trains, ``auto`` is what its config names
    :param teacher_dtype: of the teacher's
    :param precision: ``bf16`` or ``fp16``: forwards run in autocast; None: in the dtype of the weights
    :param gradient_checkpointing: keep only the inputs of blocks and compute the rest again
    :param recipe: a recipe with modifiers that work while a model trains; ``start`` and ``end`` are optimizer
        steps
    :param keep_zeros: keep what is pruned in the student pruned
    :param cache: directory for the teacher's most likely tokens; written if it is not there, and then the teacher
        is not in memory while the student trains
    :param cache_top: tokens that are kept per position
    :param log_every: optimizer steps per line of the log
    :param evaluate_every: optimizer steps between looks at held-out text; None: a tenth of all
    :param save_every: optimizer steps between checkpoints to resume from; None: a tenth of all
    :param keep_checkpoints: newest checkpoints that are kept while training
    :param use_cpu: train on the CPU though there is an accelerator
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: ShownPath = "demo"
    heldout: ShownPath | None = None
    heldout_share: float = Field(0.1, gt=0, lt=1)
    max_heldout_tokens: int = Field(32768, ge=1)
    length: int = Field(512, ge=2)
    weights: LossWeights = LossWeights()
    train: tuple[str, ...] = ("all",)
    lora: LoraSettings | None = None
    steps: int | None = Field(None, ge=1)
    epochs: float = Field(1.0, gt=0, allow_inf_nan=False)
    batch_size: int = Field(4, ge=1)
    accumulate: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_gradient_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0)
    dtype: str = "float32"
    teacher_dtype: str = "auto"
    precision: Literal["bf16", "fp16"] | None = None
    gradient_checkpointing: bool = False
    recipe: Path | None = None
    keep_zeros: bool = True
    cache: Path | None = None
    cache_top: int = Field(64, ge=1)
    log_every: int = Field(10, ge=1)
    evaluate_every: int | None = Field(None, ge=1)
    save_every: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    use_cpu: bool = False

    @field_validator("train")
    @classmethod
    def _known_sets(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return check_sets(names)

    @field_validator("dtype", "teacher_dtype")
    @classmethod
    def _known_dtype(cls, name: str, info: ValidationInfo) -> str:
        known = DTYPES if info.field_name == "teacher_dtype" else _TRAINING_DTYPES
        if name not in known:
            raise ValueError(f"choose one of {', '.join(known)}.")
        return name

    @model_validator(mode="after")
    def _fit_together(self) -> RecoverySettings:
        if self.lora is not None and LORA not in self.train:
            raise ValueError(
                f"lora is given, but train={list(self.train)} leaves the adapters out; add {LORA!r}."
            )
        if self.recipe is not None and LORA in self.train:
            raise ValueError(
                f"recipe={str(self.recipe)!r} and train={list(self.train)}: modifiers work on weights, adapters "
                "are added to them only at the end and would fill what was pruned; train a set of weights instead."
            )
        if self.cache is not None:
            self.weights.check_cached()
            if not self.weights.logits_kl:
                raise ValueError(
                    f"cache={str(self.cache)!r} serves logits_kl, which has the weight 0; leave it out."
                )
        if self.precision == "fp16" and self.dtype != "float32":
            raise ValueError(
                f"precision='fp16' scales gradients, which takes weights in float32, not dtype={self.dtype!r}."
            )
        return self

    def rows_per_step(self, ranks: int) -> int:
        """Rows behind one optimizer step."""
        return self.batch_size * self.accumulate * ranks

    def steps_for(self, rows: int, ranks: int) -> int:
        """Optimizer steps, at least one.

        :param rows: there are to train on
        """
        return self.steps or max(1, math.floor(self.epochs * rows / self.rows_per_step(ranks)))
