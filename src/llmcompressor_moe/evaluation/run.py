"""Measure a base model once, then any number of models made from it, on the same text."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedTokenizerBase

from llmcompressor_moe.check.config import first_line
from llmcompressor_moe.check.weights import require_weights
from llmcompressor_moe.evaluation.agreement import require_same_vocabulary
from llmcompressor_moe.evaluation.communication import DispatchFormat, compare_communication
from llmcompressor_moe.evaluation.cost_reading import model_cost
from llmcompressor_moe.evaluation.history import ModelLayout, match_layouts, read_history
from llmcompressor_moe.evaluation.in_memory import (
    BaseFigures,
    check_text,
    figures,
    measured,
    recorded_figures,
)
from llmcompressor_moe.evaluation.latency import SpeedSettings
from llmcompressor_moe.evaluation.recovered import read_recovery
from llmcompressor_moe.evaluation.report import BaseEvaluation, CompressedEvaluation, Evaluation
from llmcompressor_moe.evaluation.routing import compare_records
from llmcompressor_moe.evaluation.served_tasks import run_served_tasks
from llmcompressor_moe.evaluation.sources import evaluation_texts
from llmcompressor_moe.evaluation.speed import check_speed, compare_speed
from llmcompressor_moe.evaluation.tasks import TaskScore, check_tasks, run_tasks
from llmcompressor_moe.evaluation.vllm_engine import VllmError, check_interpreter
from llmcompressor_moe.evaluation.windows import vocabulary_size
from llmcompressor_moe.inspection import ModelInspection, inspect_model, read_config
from llmcompressor_moe.limits import Limits, broken_limits
from llmcompressor_moe.loading import DTYPES, load_callable, load_tokenizer, open_as_served

__all__ = [
    "BaseRecord",
    "EvaluationSettings",
    "check_evaluation",
    "evaluate",
    "evaluate_compressed",
    "recorded",
]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and how.

    :param source: ``demo`` (the bundled held-out text), a ``.txt`` or ``.jsonl`` file, or a dataset
    :param max_tokens: text is taken up to so many tokens; whole documents, at least one
    :param length: tokens per window; None: what is common, see `text.text_quality`
    :param stride: tokens that a further window predicts
    :param batch_size: windows per forward
    :param routing_tokens: tokens on which routers are compared
    :param contexts: context lengths to give operations and bytes at
    :param batches: batch sizes to give bytes at
    :param ranks: expert-parallel group sizes to count all-to-all bytes for
    :param dispatch_format: how hidden vectors travel in compressed models
    :param speed: how speed is measured; None: not at all
    :param vllm_python: interpreter of vLLM's environment; speed is measured there too, and tasks are served by it
    :param tasks: tasks of lm-eval, by name or YAML file
    :param include_path: folder with more of them
    :param limit: items per task
    :param dtype: of the models while they are measured
    :param device: where they run; None: an accelerator where there is one
    :param limits: what compressed models have to keep
    """

    source: str = "demo"
    max_tokens: int = 65536
    length: int | None = None
    stride: int | None = None
    batch_size: int = 1
    routing_tokens: int = 8192
    contexts: tuple[int, ...] = (1024,)
    batches: tuple[int, ...] = (1,)
    ranks: tuple[int, ...] = ()
    dispatch_format: DispatchFormat = "16-bit"
    speed: SpeedSettings | None = None
    vllm_python: Path | None = None
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: int | None = None
    dtype: str = "auto"
    device: str | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class BaseRecord:
    """What is kept of a base model once it has been measured."""

    settings: EvaluationSettings
    found: BaseEvaluation
    figures: BaseFigures


def evaluate(
    base: str | Path,
    compressed: Sequence[str | Path],
    settings: EvaluationSettings | None = None,
    announce: Callable[[str], None] = lambda step: None,
) -> Evaluation:
    """Measure a model and models made from it, one after the other.

    Text and routers are measured block by block on models that are opened, so that they need not fit in memory;
    see `loading.open_as_served` for those that are loaded. Tasks and speed load the whole model.

    :param base: directory of the model that they were made from
    :param compressed: directories
    :param announce: told what is being done, step by step
    :raises ValueError: something is wrong with an argument, the text, a task, or a model; says what would work
    :raises FloatingPointError: a model gives NaN or infinite logits
    """
    settings = settings or EvaluationSettings()
    with recorded(base, settings, announce, compressed) as record:
        results = [evaluate_compressed(record, path, announce) for path in compressed]
    found = Evaluation(source=settings.source, base=record.found, compressed=results, limits=settings.limits)
    if settings.speed is not None:
        _measure_speed(found, settings, announce)
    return found


@contextlib.contextmanager
def recorded(
    base: str | Path,
    settings: EvaluationSettings,
    announce: Callable[[str], None] = lambda step: None,
    compressed: Sequence[str | Path] = (),
) -> Iterator[BaseRecord]:
    """Measure a base model and keep what models made from it are compared with, in a temporary file.

    :param compressed: models that are going to be, where they are there already
    :raises ValueError: see `evaluate`
    """
    tokenizer, texts = check_evaluation(settings, base, compressed)
    cost = model_cost(base, contexts=settings.contexts, batches=settings.batches)
    announce(f"Base model: {base}")
    model = open_as_served(base, settings.dtype, settings.device)
    with recorded_figures(
        model,
        tokenizer,
        texts,
        settings.length,
        settings.stride,
        batch_size=settings.batch_size,
        routing_tokens=settings.routing_tokens,
    ) as measurements:
        del model
        gc.collect()
        scores = _tasks(base, tokenizer, settings)
        found = BaseEvaluation(path=str(base), text=measurements.text, cost=cost, tasks=scores)
        yield BaseRecord(settings, found, measurements)


def evaluate_compressed(
    record: BaseRecord, path: str | Path, announce: Callable[[str], None] = lambda step: None
) -> CompressedEvaluation:
    """Measure one model made from a recorded base.

    :raises ValueError: see `evaluate`
    """
    settings = record.settings
    announce(f"Compressed model: {path}")
    history, base_history = read_history(path), read_history(record.found.path)
    recovery = read_recovery(path)
    cost = model_cost(path, contexts=settings.contexts, batches=settings.batches)
    model = open_as_served(path, settings.dtype, settings.device)
    base = record.figures
    found = measured(model, base)
    del model
    gc.collect()
    compared = compare_records(base.routing, found.routing, history, base_history=base_history)
    return CompressedEvaluation(
        path=str(path),
        text=found.text,
        cost=cost,
        tasks=_tasks(path, base.tokenizer, settings),
        agreement=found.agreement,
        routing=compared,
        recovery=recovery,
        communication=[
            compare_communication(
                base.routing,
                found.routing,
                history,
                ranks,
                base_history=base_history,
                format_after=settings.dispatch_format,
            )
            for ranks in settings.ranks
        ],
        broken_limits=broken_limits(settings.limits, figures(base, found, compared)),
    )


def _measure_speed(found: Evaluation, settings: EvaluationSettings, announce: Callable[[str], None]) -> None:
    """An engine that cannot run a model must not cost what has been measured so far."""
    paths = [model.path for model in found.compressed]
    for engine in ("transformers", *(["vllm"] if settings.vllm_python else [])):
        announce(f"Speed in {engine}")
        try:
            found.speed += compare_speed(
                found.base.path,
                paths,
                settings.speed,
                device=settings.device,
                vllm_python=settings.vllm_python,
                engines=[engine],
            )
        except (VllmError, torch.OutOfMemoryError) as error:
            found.speed_errors[engine] = str(error)


def check_evaluation(
    settings: EvaluationSettings, base: str | Path, compressed: Sequence[str | Path] = ()
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Find what is wrong before any weights are read.

    :return: the base's tokenizer and the text
    :raises ValueError: see `evaluate`
    """
    _check_options(settings)
    inspected = {path: inspect_model(path, schemes=()) for path in (base, *compressed)}
    for path in inspected:
        require_weights(path)
    most = max(layer.experts for layer in inspected[base].moe_layers)
    if settings.ranks and max(settings.ranks) > most:
        raise ValueError(
            f"ranks={max(settings.ranks)}: a layer of {str(base)!r} has {most} experts, so ranks would be left "
            f"without any; give at most {most}."
        )
    for path in compressed:
        _check_made_from(base, path, inspected)
    tokenizer = load_tokenizer(base)
    texts = evaluation_texts(settings.source, tokenizer, settings.max_tokens)
    check_text(read_config(base).parsed, tokenizer, texts, settings.length, settings.stride)
    if settings.speed is not None:
        check_speed([base, *compressed], settings.speed)
    if settings.tasks:
        check_tasks(
            settings.tasks, settings.include_path, settings.limit, served=settings.vllm_python is not None
        )
    return tokenizer, texts


def _check_options(settings: EvaluationSettings) -> None:
    for name in ("max_tokens", "batch_size", "routing_tokens", *(["limit"] if settings.limit else [])):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)}: give at least 1.")
    for name, known in (("dtype", DTYPES), ("dispatch_format", get_args(DispatchFormat))):
        if getattr(settings, name) not in known:
            raise ValueError(f"{name}={getattr(settings, name)!r}: choose one of {', '.join(known)}.")
    for name in ("include_path", "limit"):
        if getattr(settings, name) is not None and not settings.tasks:
            raise ValueError(
                f"{name}={str(getattr(settings, name))!r} is about tasks, but there is none; name one."
            )
    if settings.vllm_python is not None:
        check_interpreter(settings.vllm_python, "vllm_python")
    if settings.device is not None:
        _check_device(settings.device)


def _check_device(device: str) -> None:
    try:
        # Moved back: what lies on the meta device holds no values.
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={device!r} cannot be used ({first_line(error)}); give cpu, or an accelerator that torch sees "
            "here, such as cuda."
        ) from error


def _check_made_from(
    base: str | Path, path: str | Path, inspected: Mapping[str | Path, ModelInspection]
) -> None:
    """By config and history; whether weights tell of it, nothing says."""
    ours, theirs = inspected[base].model_type, inspected[path].model_type
    if ours != theirs:
        raise ValueError(
            f"model {str(path)!r} is of model_type {theirs!r}, the base {str(base)!r} of {ours!r}; compare a "
            "model with the one that it was made from."
        )
    require_same_vocabulary(*(vocabulary_size(read_config(one).parsed) for one in (base, path)))
    before, after = (
        ModelLayout(
            inspected[one].blocks, {layer.index: layer.experts for layer in inspected[one].moe_layers}
        )
        for one in (base, path)
    )
    match_layouts(before, after, read_history(path), read_history(base))


def _tasks(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings
) -> list[TaskScore]:
    if not settings.tasks:
        return []
    if settings.vllm_python is not None:
        return run_served_tasks(
            path, settings.tasks, settings.vllm_python, settings.include_path, settings.limit
        )
    # Called once for each item and answer: reading the model from its files every time would never end.
    return run_tasks(
        load_callable(path, settings.dtype, settings.device),
        tokenizer,
        list(settings.tasks),
        include_path=settings.include_path,
        limit=settings.limit,
        batch_size=settings.batch_size,
    )
