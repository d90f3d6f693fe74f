"""Measure how fast models fill a prompt and decode, in transformers and in vLLM.

Models take turns: in every round each of them runs every shape once, so that another load on the machine slows
all alike. Figures are medians over rounds with quartiles, after one round that warms up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmcompressor_moe.evaluation.cost import ModelCost
from llmcompressor_moe.evaluation.cost_reading import model_cost
from llmcompressor_moe.evaluation.latency import (
    Engine,
    Latency,
    Quartiles,
    SpeedComparison,
    SpeedSettings,
    compare_latencies,
)
from llmcompressor_moe.evaluation.transformers_engine import TransformersModel, resident_peaks
from llmcompressor_moe.evaluation.turns import Turn, take_turns
from llmcompressor_moe.evaluation.vllm_engine import VllmProcess
from llmcompressor_moe.inspection import read_config

__all__ = ["check_speed", "compare_speed", "measure_transformers", "measure_vllm"]

_GROWN = "growth of the resident memory of a process that does nothing else"
# What vLLM's cache gets at least: it counts in blocks, and in layers' other states.
_CACHE_FLOOR, _CACHE_BLOCK = 64 * 1024**2, 256


@dataclass(frozen=True)
class _Job:
    """A shape with its prompts."""

    batch: int
    length: int
    rows: list[list[int]]


def measure_transformers(
    paths: Sequence[str | Path],
    settings: SpeedSettings | None = None,
    *,
    device: str | None = None,
    prompts: torch.Tensor | None = None,
) -> list[Latency]:
    """Measure checkpoints in transformers, in this process, in the dtype that each is stored in.

    Peak memory on a GPU is what torch allocated, less what the other models hold; on a CPU each model runs once
    more in a process of its own, whose growth counts (`resident_peaks`).

    :param paths: checkpoint directories, trimmed and quantized ones too; they take turns
    :param device: as torch names it; the GPU where there is one, unless given
    :param prompts: token ids, [at least the largest batch, at least the longest prompt]; random ones unless given
    :return: for each path in order, its shapes from the smallest to the largest
    :raises ValueError: a number is not positive, a sequence would be longer than a model's positions, or
        ``prompts`` do not fit
    """
    settings = settings or SpeedSettings()
    jobs = _jobs(paths, settings, prompts)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    turns = take_turns(
        [lambda path=path: TransformersModel(path, device) for path in paths],
        [job.rows for job in jobs],
        settings,
    )
    latencies = []
    for path, of_model in zip(paths, turns, strict=True):
        found = [
            _latency("transformers", path, job, settings, rounds)
            for job, rounds in zip(jobs, of_model, strict=True)
        ]
        if settings.memory and torch.device(device).type == "cpu":
            peaks = resident_peaks(path, [(job.rows, settings.new_tokens) for job in jobs])
            for latency, peak in zip(found, peaks, strict=True):
                latency.peak_nbytes, latency.peak_method = peak, _GROWN if peak is not None else None
        latencies += found
    return latencies


def measure_vllm(
    paths: Sequence[str | Path],
    settings: SpeedSettings | None = None,
    *,
    python: str | Path,
    options: Mapping[str, Any] | None = None,
    prompts: torch.Tensor | None = None,
) -> list[Latency]:
    """Measure checkpoints in vLLM, each in a process of its own in vLLM's environment.

    Steps of the engine are timed one by one: the prefill ends with the step that gives the last sequence its
    first token. Prompts of a batch are prefilled in one step. Peak memory includes vLLM's KV cache, which is
    made large enough for the largest shape; on a GPU it is what torch allocated, else the process's growth.

    :param python: the interpreter of that environment
    :param options: more options for ``vllm.LLM``, which win; on a GPU each process is given an equal share of
        the memory
    :param prompts: see `measure_transformers`
    :return: for each path in order, its shapes from the smallest to the largest
    :raises ValueError: as `measure_transformers`, or there is no such interpreter
    :raises VllmError: vLLM cannot load a checkpoint, or stopped
    """
    settings = settings or SpeedSettings()
    jobs = _jobs(paths, settings, prompts)
    alive = len(paths) if settings.together else 1
    turns = take_turns(
        [
            lambda path=path: VllmProcess(
                path, python, _vllm_options(model_cost(path), settings, alive) | dict(options or {})
            )
            for path in paths
        ],
        [job.rows for job in jobs],
        settings,
    )
    return [
        _latency("vllm", path, job, settings, rounds)
        for path, of_model in zip(paths, turns, strict=True)
        for job, rounds in zip(jobs, of_model, strict=True)
    ]


def compare_speed(
    base: str | Path,
    compressed: Sequence[str | Path],
    settings: SpeedSettings | None = None,
    *,
    device: str | None = None,
    vllm_python: str | Path | None = None,
    vllm_options: Mapping[str, Any] | None = None,
    engines: Sequence[Engine] | None = None,
    prompts: torch.Tensor | None = None,
    routing: Mapping[str, Mapping[int, Sequence[float]]] | None = None,
) -> list[SpeedComparison]:
    """Measure compressed checkpoints and their base side by side, all of them in the same rounds.

    :param engines: defaults to transformers, and vLLM where ``vllm_python`` is given
    :param vllm_python: the interpreter of vLLM's environment
    :param routing: path -> routing shares of that model, see `ModelCost.decode_at`
    :return: by engine, then by compressed model, then by shape
    :raises ValueError: see `measure_transformers` and `measure_vllm`; or an engine is unknown
    :raises VllmError: vLLM cannot load a checkpoint, or stopped
    """
    settings = settings or SpeedSettings()
    if engines is None:
        engines = ("transformers", "vllm") if vllm_python is not None else ("transformers",)
    unknown = [engine for engine in engines if engine not in ("transformers", "vllm")]
    if unknown:
        raise ValueError(f"engines has {unknown[0]!r}; there are 'transformers' and 'vllm'.")
    if "vllm" in engines and vllm_python is None:
        raise ValueError(
            "engines has 'vllm', but vllm_python is not given; name its environment's interpreter."
        )
    if not compressed:
        raise ValueError("compressed is empty; name at least one checkpoint to compare with the base.")
    paths = [base, *compressed]
    check_speed(paths, settings)
    costs = [model_cost(path) for path in paths]
    found = []
    for engine in engines:
        if engine == "vllm":
            latencies = measure_vllm(
                paths, settings, python=vllm_python, options=vllm_options, prompts=prompts
            )
        else:
            latencies = measure_transformers(paths, settings, device=device, prompts=prompts)
        found += _comparisons(latencies, costs, len(settings.shapes), routing or {})
    return found


def _comparisons(
    latencies: Sequence[Latency],
    costs: Sequence[ModelCost],
    shapes: int,
    routing: Mapping[str, Mapping[int, Sequence[float]]],
) -> list[SpeedComparison]:
    by_model = [latencies[start : start + shapes] for start in range(0, len(latencies), shapes)]
    shares = {str(path): found for path, found in routing.items()}

    def of(latency: Latency) -> Mapping[int, Sequence[float]] | None:
        return shares.get(latency.path)

    return [
        compare_latencies(base, small, costs[0], cost, base_routing=of(base), compressed_routing=of(small))
        for cost, measured in zip(costs[1:], by_model[1:], strict=True)
        for base, small in zip(by_model[0], measured, strict=True)
    ]


def _latency(
    engine: Engine, path: str | Path, job: _Job, settings: SpeedSettings, turns: Sequence[Turn]
) -> Latency:
    peaks = [turn.peak_nbytes for turn in turns if turn.peak_nbytes is not None and settings.memory]
    decoded, made = job.batch * (settings.new_tokens - 1), job.batch * settings.new_tokens
    return Latency(
        engine=engine,
        path=str(path),
        device=turns[0].device,
        batch=job.batch,
        prompt_length=job.length,
        new_tokens=settings.new_tokens,
        prefill_seconds=Quartiles.of([turn.prefill_seconds for turn in turns]),
        decode_tokens_per_second=Quartiles.of([decoded / turn.decode_seconds for turn in turns]),
        tokens_per_second=Quartiles.of(
            [made / (turn.prefill_seconds + turn.decode_seconds) for turn in turns]
        ),
        peak_nbytes=max(peaks, default=None),
        peak_method=turns[0].peak_method if peaks else None,
        prefill_rounds=[turn.prefill_seconds for turn in turns],
        decode_rounds=[turn.decode_seconds for turn in turns],
    )


def check_speed(paths: Sequence[str | Path], settings: SpeedSettings) -> None:
    """Refuse what would only fail after models were loaded."""
    if not paths:
        raise ValueError("paths is empty; name at least one checkpoint.")
    for field in ("batch_sizes", "prompt_lengths"):
        values = getattr(settings, field)
        if not values or min(values) < 1:
            raise ValueError(f"{field}={values} must be numbers of at least 1, one or more of them.")
    if settings.new_tokens < 2:
        raise ValueError(
            f"new_tokens={settings.new_tokens} must be at least 2: the first token comes from the prefill."
        )
    if settings.rounds < 1:
        raise ValueError(f"rounds={settings.rounds} must be at least 1.")
    longest = max(settings.prompt_lengths) + settings.new_tokens
    for path in paths:
        positions = read_config(path).value("max_position_embeddings")
        if positions is not None and longest > positions:
            raise ValueError(
                f"prompt_lengths={settings.prompt_lengths} with new_tokens={settings.new_tokens} make {longest} "
                f"tokens; {str(path)!r} has {positions} positions (max_position_embeddings). Shorten either."
            )


def _jobs(paths: Sequence[str | Path], settings: SpeedSettings, prompts: torch.Tensor | None) -> list[_Job]:
    check_speed(paths, settings)
    vocabulary = min(int(read_config(path).value("vocab_size")) for path in paths)
    batch, length = max(settings.batch_sizes), max(settings.prompt_lengths)
    if prompts is None:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(vocabulary, (batch, length), generator=generator)
    if prompts.ndim != 2 or prompts.shape[0] < batch or prompts.shape[1] < length:
        raise ValueError(
            f"prompts has shape {tuple(prompts.shape)}; the largest shape needs at least ({batch}, {length})."
        )
    if prompts.min() < 0 or prompts.max() >= vocabulary:
        raise ValueError(
            f"prompts has token ids from {prompts.min()} to {prompts.max()}; the models know 0 to "
            f"{vocabulary - 1}."
        )
    return [_Job(b, n, prompts[:b, :n].tolist()) for b, n in settings.shapes]


def _vllm_options(cost: ModelCost, settings: SpeedSettings, alive: int) -> dict[str, Any]:
    """Options that make room for the largest shape, and for nothing more."""
    batch, length = max(settings.batch_sizes), max(settings.prompt_lengths) + settings.new_tokens
    blocks = -(-length // _CACHE_BLOCK) + 1
    values = sum(layer.cached_values for layer in cost.attention)
    # Four bytes each, whatever dtype vLLM picks, and a block to spare for each sequence.
    cache = max(_CACHE_FLOOR, 4 * values * (batch + 1) * blocks * _CACHE_BLOCK)
    return {
        "max_model_len": length,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(length, batch * max(settings.prompt_lengths)),
        "kv_cache_memory_bytes": cache,
        "gpu_memory_utilization": 0.9 / alive,
    }
