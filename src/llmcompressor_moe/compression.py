"""From a checkpoint and a recipe to a smaller checkpoint with its tokenizer, checked."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.recipe import Recipe
from pydantic import BaseModel, SerializeAsAny
from transformers import PreTrainedModel

from llmcompressor_moe.calibration import calibration_samples
from llmcompressor_moe.check import CheckReport, check_checkpoint
from llmcompressor_moe.checkpoint.atomic import atomic_directory, check_can_write
from llmcompressor_moe.inspection import ModelInspection, inspect_model
from llmcompressor_moe.limits import LimitsBrokenError
from llmcompressor_moe.loading import DTYPES, load_tokenizer
from llmcompressor_moe.modifiers import QualityGateModifier, RouterCalibrationModifier
from llmcompressor_moe.modifiers.trim import TrimModifier
from llmcompressor_moe.recipe_file import read_recipe
from llmcompressor_moe.report import ModifierReport
from llmcompressor_moe.saving.opened import open_moe
from llmcompressor_moe.saving.save import is_research_only, rejected

__all__ = ["DTYPES", "PIPELINES", "CompressionSummary", "compress"]

PIPELINES = ("independent", "sequential")
# They remove or watch weights, or fit routers and norms, which no format quantizes.
_KEEP_WEIGHTS = (TrimModifier, REAPPruningModifier, QualityGateModifier, RouterCalibrationModifier)


class CompressionSummary(BaseModel):
    """What a compression did.

    :param bytes_before: bytes of the weight files
    :param reports: one per modifier of this package, in order
    :param check: the verdict on the new checkpoint
    :param needs_plugin: whether vLLM needs the plugin for it, and transformers `load_trimmed_moe`
    :param calibration_tokens: 0 when no data was used
    :param seconds: wall-clock time of everything
    """

    model: str
    output: str
    parameters_before: int
    parameters_after: int
    active_before: int
    active_after: int
    bytes_before: int
    bytes_after: int
    reports: list[SerializeAsAny[ModifierReport]]
    check: CheckReport
    needs_plugin: bool
    calibration_tokens: int
    seconds: float

    @property
    def serve_command(self) -> str:
        """The command that serves the new checkpoint with vLLM."""
        return f"vllm serve {shlex.quote(self.output)}"


def compress(
    model: str | Path,
    recipe: str | Path,
    dataset: str | Path | None,
    output: str | Path,
    *,
    num_samples: int = 128,
    sequence_length: int = 512,
    batch_size: int = 1,
    pipeline: str = "independent",
    dtype: str = "auto",
    requantize: bool = False,
    gate: Modifier | None = None,
    announce: Callable[[str], None] = lambda step: None,
) -> CompressionSummary:
    """Apply a recipe to a checkpoint directory and write the result with its tokenizer, as a whole or not at
    all.

    Everything that can be wrong without the weights is found before they are read.

    :param recipe: a YAML recipe file
    :param dataset: see `calibration_samples`; None for recipes that need no data
    :param output: directory to write; an earlier checkpoint there is replaced at the very end
    :param sequence_length: tokens per calibration sample
    :param requantize: decode weights that are stored quantized, so that the recipe can quantize them
    :param gate: a `QualityGateModifier` to put at the end of the recipe
    :param announce: told what is being done, step by step
    :raises ValueError: something is wrong with an argument, the recipe, the data or the model; says what
        would work
    :raises LimitsBrokenError: the result breaks limits; it was written to ``OUTPUT.rejected``, ``output`` is as it
        was
    :raises OutputDirectoryError: the output cannot be written; it is as it was
    :raises IllegalCheckpointError: the result would not be legal to serve; nothing was written
    """
    started = time.perf_counter()
    _check_arguments(model, output, num_samples, sequence_length, batch_size, pipeline, dtype)
    parsed = read_recipe(recipe)
    announce("Reading the model's config")
    before = inspect_model(model)
    _check_source(before, parsed, requantize)
    if dataset is None:
        _check_needs_no_data(parsed)
    announce("Preparing tokenizer and calibration data")
    tokenizer = load_tokenizer(model)
    options: dict[str, Any] = {}
    tokens = 0
    if dataset is not None:
        samples = calibration_samples(dataset, tokenizer, num_samples, sequence_length)
        tokens = sum(map(len, samples["input_ids"]))
        options = {
            "dataset": samples,
            "num_calibration_samples": len(samples),
            "max_seq_length": sequence_length,
            "batch_size": batch_size,
            "shuffle_calibration_samples": False,
        }
    announce("Opening the model")
    loaded = open_moe(model, dtype=dtype, requantize=requantize, scratch=Path(output).absolute().parent)
    announce("Applying the recipe: " + ", ".join(type(modifier).__name__ for modifier in parsed.modifiers))
    steps = str(recipe) if gate is None else [*parsed.modifiers, gate]
    loaded = oneshot(model=loaded, tokenizer=tokenizer, recipe=steps, pipeline=pipeline, **options)
    broken = loaded.__dict__.pop("_broken_limits", [])
    target = rejected(output) if broken else Path(output)
    announce(f"Saving to {target}")
    check = _save(loaded, target)
    if broken:
        raise LimitsBrokenError(broken, f"The checkpoint is kept apart in {str(target)!r}.")
    after = inspect_model(output)
    return CompressionSummary(
        model=str(model),
        output=str(output),
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        active_before=before.active_parameters,
        active_after=after.active_parameters,
        bytes_before=before.on_disk or before.nbytes,
        bytes_after=after.on_disk or after.nbytes,
        reports=getattr(loaded, "_trim_history", []),
        check=check,
        needs_plugin=bool(after.dropped_moe_layers) or len({layer.experts for layer in after.moe_layers}) > 1,
        calibration_tokens=tokens,
        seconds=time.perf_counter() - started,
    )


def _check_arguments(
    model: str | Path,
    output: str | Path,
    num_samples: int,
    sequence_length: int,
    batch_size: int,
    pipeline: str,
    dtype: str,
) -> None:
    numbers = {"num_samples": num_samples, "sequence_length": sequence_length, "batch_size": batch_size}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    for name, value, known in (("pipeline", pipeline, PIPELINES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}.")
    if Path(output).resolve() == Path(model).resolve():
        raise ValueError(f"output={str(output)!r} is the model itself; name another directory.")
    check_can_write(output)


def _check_source(source: ModelInspection, recipe: Recipe, requantize: bool) -> None:
    """Refuse to quantize weights that are stored quantized, unless that is asked for."""
    changing = [type(m).__name__ for m in recipe.modifiers if not isinstance(m, _KEEP_WEIGHTS)]
    if source.quantization is not None and changing and not requantize:
        raise ValueError(
            f"model {source.path!r} is stored quantized (quant_method={source.quantization!r}), and "
            f"{changing[0]} would change its weights. Start from the checkpoint that it was made from, pass "
            "--requantize (requantize=True) to decode it first, or leave the modifier out: drops keep the stored "
            "precision."
        )


def _check_needs_no_data(recipe: Recipe) -> None:
    for modifier in recipe.modifiers:
        needs = getattr(modifier, "_needs_data", lambda m=modifier: m.requires_calibration_data)
        way_out = getattr(modifier, "_way_without_data", lambda: "name the indices to drop")
        if needs():
            raise ValueError(
                f"{type(modifier).__name__} needs calibration data: give a dataset, or {way_out()}."
            )


def _save(model: PreTrainedModel, output: str | Path) -> CheckReport:
    with atomic_directory(output, "run the command again") as directory:
        model.save_pretrained(directory)
        report = check_checkpoint(directory).raise_if_errors(research=is_research_only(model))
    report.path = str(output)
    return report
