"""From a checkpoint and a recipe to a smaller checkpoint with its tokenizer, checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.recipe import Recipe
from llmcompressor.utils.dev import get_main_device
from pydantic import BaseModel, SerializeAsAny
from safetensors import SafetensorError

from llmcompressor_moe.architectures import is_brought
from llmcompressor_moe.calibration import calibration_samples
from llmcompressor_moe.check import CheckReport, IllegalCheckpointError, check_checkpoint
from llmcompressor_moe.checkpoint.atomic import OutputDirectoryError, check_can_write, unfinished_in
from llmcompressor_moe.checkpoint.fingerprint import fingerprint
from llmcompressor_moe.compat.llmcompressor.progress import without_bars
from llmcompressor_moe.inspection import ModelInspection, inspect_model
from llmcompressor_moe.limits import LimitsBrokenError
from llmcompressor_moe.loading import DTYPES, load_tokenizer
from llmcompressor_moe.modifiers import QualityGateModifier, RouterCalibrationModifier
from llmcompressor_moe.modifiers.base import MoEModifier
from llmcompressor_moe.modifiers.composition import check_recipe
from llmcompressor_moe.modifiers.trim import TrimModifier
from llmcompressor_moe.profile.computing import fast_dtype
from llmcompressor_moe.profile.options import run_options
from llmcompressor_moe.progress import run_progress
from llmcompressor_moe.recipe_file import read_recipe
from llmcompressor_moe.report import ModifierReport
from llmcompressor_moe.resources import (
    ResourceEstimate,
    check_disk_space,
    estimate_resources,
    model_shape,
    wave_tokens,
)
from llmcompressor_moe.saving.opened import open_moe
from llmcompressor_moe.saving.save import broken_limits_of, rejected
from llmcompressor_moe.sizes import parse_bytes
from llmcompressor_moe.work_folder import WorkFolder, work_path

__all__ = ["COMPUTE_DTYPES", "DTYPES", "PIPELINES", "CompressionSummary", "compress"]

COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
PIPELINES = ("independent", "sequential")
# Beside the package itself, what the bytes of a result may depend on.
_VERSIONS = ("llmcompressor-moe", "llmcompressor", "compressed-tensors", "transformers", "torch")
_CONTINUE = "run the command again with --resume to go on"
# They remove or watch weights, or fit routers and norms, which no format quantizes.
_KEEP_WEIGHTS = (TrimModifier, REAPPruningModifier, QualityGateModifier, RouterCalibrationModifier)


class CompressionSummary(BaseModel):
    """What a compression did.

    :param bytes_before: bytes of the weight files
    :param reports: one per modifier of this package, in order
    :param check: the verdict on the new checkpoint
    :param needs_plugin: whether vLLM needs the plugin for it, because layers differ or for its config, and
        transformers `load_trimmed_moe`
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
    compute_dtype: str = "auto",
    max_memory: int | str | None = None,
    requantize: bool = False,
    resume: bool = False,
    snapshot_seconds: float = 60,
    gate: Modifier | None = None,
    announce: Callable[[str], None] = lambda step: None,
    on_estimate: Callable[[ResourceEstimate], None] = lambda estimate: None,
    free_space: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> CompressionSummary:
    """Apply a recipe to a checkpoint directory and write the result with its tokenizer, as a whole or not at
    all.

    Everything that can be wrong without the weights is found before they are read. While it works, it keeps what
    it has in ``.OUTPUT.work`` beside the output; an interrupted run can be continued from there.

    :param recipe: a YAML recipe file
    :param dataset: see `calibration_samples`; None for recipes that need no data
    :param output: directory to write; an earlier checkpoint there is replaced at the very end
    :param sequence_length: tokens per calibration sample
    :param compute_dtype: dtype that 16-bit weights are computed in; ``auto``: see `computing.fast_dtype`
    :param max_memory: bytes, or a text such as ``8GiB``, that hidden states may take while they wait between
        blocks; defaults to half of the available memory
    :param requantize: decode weights that are stored quantized, so that the recipe can quantize them
    :param resume: go on where an earlier call with the same arguments was stopped; it starts from the beginning
        where there is nothing to continue
    :param snapshot_seconds: time between two snapshots of a calibration pass, at least
    :param gate: a `QualityGateModifier` to put at the end of the recipe
    :param announce: called with what is being done, step by step
    :param on_estimate: called with what the run needs, before it starts
    :param free_space: gives the free bytes of the file system of a directory
    :raises ValueError: something is wrong with an argument, the recipe, the data or the model; says what
        would work
    :raises WorkFolderError: there is nothing that fits to continue, or another process writes to this output
    :raises NotEnoughSpaceError: the disk has too little space; nothing was written
    :raises LimitsBrokenError: the result breaks limits; it was written to ``OUTPUT.rejected``, ``output`` is as it
        was
    :raises OutputDirectoryError: the output cannot be written; it is as it was
    :raises CheckpointChangedError: a file of the model changed or went away meanwhile; the output is as it was
    :raises IllegalCheckpointError: the result would not be legal to serve; nothing was written
    """
    started = time.perf_counter()
    _check_arguments(
        model,
        output,
        num_samples,
        sequence_length,
        batch_size,
        pipeline,
        dtype,
        compute_dtype,
        snapshot_seconds,
    )
    memory = None if max_memory is None else parse_bytes(max_memory, "max_memory")
    parsed = read_recipe(recipe)
    announce("Reading the model's config")
    before = inspect_model(model)
    _check_source(before, parsed, requantize)
    if dataset is None:
        _check_needs_no_data(parsed)
    announce("Preparing tokenizer and calibration data")
    tokenizer = load_tokenizer(model)
    samples = None
    options: dict[str, Any] = {}
    if dataset is not None:
        samples = calibration_samples(dataset, tokenizer, num_samples, sequence_length)
        options = {
            "dataset": samples,
            "num_calibration_samples": len(samples),
            "max_seq_length": sequence_length,
            "batch_size": batch_size,
            "shuffle_calibration_samples": False,
        }
    tokens = sum(map(len, samples["input_ids"])) if samples is not None else 0
    device = get_main_device()
    computed = _compute_dtype(compute_dtype, dtype, before, device)
    shape = model_shape(model, before)
    wave = wave_tokens(shape, computed, device, memory)
    estimate = estimate_resources(
        model,
        shape,
        parsed,
        tokens=tokens,
        wave=wave,
        batch_tokens=batch_size * sequence_length,
        samples=len(samples) if samples is not None else 0,
        compute_dtype=computed,
        max_memory=memory,
        requantize=requantize,
        gated=gate is not None,
    )
    on_estimate(estimate)
    steps = str(recipe) if gate is None else [*parsed.modifiers, gate]
    work = WorkFolder(work_path(output), snapshot_seconds)
    with work.locked():
        check_disk_space(estimate, output, free_space, already=work.nbytes if resume else 0)
        if work.resumable and not resume:
            announce(
                f"Starting over: {str(work.path)!r} of an earlier run is removed (--resume goes on instead)"
            )
        identity = {
            **{"model": str(Path(model).resolve()), "weights": fingerprint(model)},
            **_recipe_identity(recipe, parsed, gate),
            "dataset": _digest(samples["input_ids"]) if samples is not None else None,
            **{"batch_size": batch_size, "pipeline": pipeline, "dtype": dtype, "requantize": requantize},
            **{"compute_dtype": str(computed).removeprefix("torch."), "device": torch.device(device).type},
            **{f"version of {name}": _version(name) for name in _VERSIONS},
        }
        chosen = work.prepare(
            identity,
            {"wave_tokens": wave},
            resume=resume,
            same_bytes=all(isinstance(m, TrimModifier | QualityGateModifier) for m in parsed.modifiers),
        )
        if resume:
            announce("Going on" if work.resumable else "Nothing to continue: starting from the beginning")
        with (
            _kept_if_worth(work),
            work.current(),
            run_options(compute_dtype=computed, max_memory=memory, scratch=work.scratch, **chosen),
            run_progress(estimate.work, estimate.pass_work) as run,
            without_bars(lambda: run.part_of_pass(1 / (shape.blocks + 1))),
        ):

            def step(text: str) -> None:
                with run.aside():
                    announce(text)

            step("Opening the model")
            loaded = open_moe(model, dtype=dtype, requantize=requantize, scratch=work.scratch)
            if not any(isinstance(modifier, MoEModifier) for modifier in parsed.modifiers):
                # Ours ask themselves.
                check_recipe(parsed.modifiers, loaded)
            step(
                "Applying the recipe: " + ", ".join(type(modifier).__name__ for modifier in parsed.modifiers)
            )
            loaded = oneshot(model=loaded, tokenizer=tokenizer, recipe=steps, pipeline=pipeline, **options)
            target = rejected(output) if broken_limits_of(loaded) else Path(output)
            step(f"Saving to {target}")
            with unfinished_in(work.unfinished, _CONTINUE):
                loaded.save_pretrained(output)
    check = check_checkpoint(output)
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
        needs_plugin=is_brought(after.model_type)
        or bool(after.dropped_moe_layers)
        or len({layer.experts for layer in after.moe_layers}) > 1,
        calibration_tokens=tokens,
        seconds=time.perf_counter() - started,
    )


@contextlib.contextmanager
def _kept_if_worth(work: WorkFolder) -> Iterator[None]:
    """The work folder goes when the run has ended, and when there is nothing in it that would save time."""
    try:
        yield
    except (LimitsBrokenError, IllegalCheckpointError):
        # The same would come out again.
        work.clear()
        raise
    except BaseException as error:
        shutil.rmtree(work.scratch, ignore_errors=True)
        if not work.resumable:
            work.clear()
        if isinstance(error, SafetensorError):
            raise OutputDirectoryError(
                f"{str(work.scratch)!r} cannot be written ({error}). Free space or choose another output and "
                f"{_CONTINUE}."
            ) from error
        raise
    work.clear()


def _compute_dtype(
    compute_dtype: str, dtype: str, inspection: ModelInspection, device: torch.device
) -> torch.dtype:
    if compute_dtype != "auto":
        return getattr(torch, compute_dtype)
    return fast_dtype(getattr(torch, inspection.dtype if dtype == "auto" else dtype), device)


def _recipe_identity(path: str | Path, recipe: Recipe, gate: Modifier | None) -> dict[str, Any]:
    plans = [modifier.plan_path for modifier in recipe.modifiers if getattr(modifier, "plan_path", None)]
    return {
        "recipe": Path(path).read_text(),
        "plans": {
            plan: hashlib.sha256(Path(plan).read_bytes()).hexdigest()
            for plan in plans
            if Path(plan).is_file()
        },
        "limits": None if gate is None else gate.model_dump(mode="json", exclude_none=True),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value if isinstance(value, list) else list(value)).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_arguments(
    model: str | Path,
    output: str | Path,
    num_samples: int,
    sequence_length: int,
    batch_size: int,
    pipeline: str,
    dtype: str,
    compute_dtype: str,
    snapshot_seconds: float,
) -> None:
    if snapshot_seconds < 0:
        raise ValueError(f"snapshot_seconds={snapshot_seconds}: give 0 or more.")
    numbers = {"num_samples": num_samples, "sequence_length": sequence_length, "batch_size": batch_size}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    for name, value, known in (
        ("pipeline", pipeline, PIPELINES),
        ("dtype", dtype, DTYPES),
        ("compute_dtype", compute_dtype, COMPUTE_DTYPES),
    ):
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
