"""How fast a model fills a prompt and decodes, in transformers and in vLLM, beside what its bytes would allow.

Models take turns: in every round each of them runs every shape once, so that another load on the machine slows
all alike. Figures are medians over rounds with quartiles, after one round that warms up.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from llmcompressor_moe.evaluation.cost import ModelCost, model_cost
from llmcompressor_moe.evaluation.transformers_engine import TransformersModel, resident_peaks
from llmcompressor_moe.evaluation.turn import Runner, Turn
from llmcompressor_moe.evaluation.vllm_engine import VllmProcess
from llmcompressor_moe.inspection import read_config

__all__ = [
    "Latency",
    "Quartiles",
    "SpeedComparison",
    "SpeedSettings",
    "compare_latencies",
    "compare_speed",
    "measure_transformers",
    "measure_vllm",
    "take_turns",
]

Engine = Literal["transformers", "vllm"]

_GROWN = "growth of the resident memory of a process that does nothing else"
# What vLLM's cache gets at least: it counts in blocks, and in layers' other states.
_CACHE_FLOOR, _CACHE_BLOCK = 64 * 1024**2, 256


class SpeedSettings(BaseModel):
    """What is measured.

    :param batch_sizes: sequences at once
    :param prompt_lengths: tokens of each prompt; every batch size is measured with every length
    :param new_tokens: tokens that each sequence is continued by; the first comes from the prefill
    :param rounds: turns per model and shape that count
    :param together: keep all models loaded; else each is loaded anew for its turns in every round, for models
        that do not fit in memory together
    :param memory: measure the peak memory too; for transformers on a CPU that loads each model once more
    """

    model_config = ConfigDict(extra="forbid")

    batch_sizes: tuple[int, ...] = (1,)
    prompt_lengths: tuple[int, ...] = (128,)
    new_tokens: int = 64
    rounds: int = 5
    together: bool = True
    memory: bool = True

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Batch size and prompt length of every shape, the smallest first."""
        pairs = {(batch, length) for batch in self.batch_sizes for length in self.prompt_lengths}
        return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))


class Quartiles(BaseModel):
    """A median with the quartiles around it."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Quartiles of at least one value, interpolated within them."""
        if len(values) == 1:
            return cls(lower=values[0], median=values[0], upper=values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(lower=lower, median=median, upper=upper)


class Latency(BaseModel):
    """One model at one shape in one engine.

    :param path: checkpoint directory
    :param device: what it ran on
    :param prompt_length: tokens per prompt
    :param new_tokens: tokens that each sequence was continued by
    :param prefill_seconds: until every sequence had its first new token
    :param decode_tokens_per_second: of all sequences together, the first token of each left out
    :param tokens_per_second: new tokens of all sequences over the whole time
    :param peak_nbytes: the most memory in use at this shape, the model with it
    :param peak_method: how that was measured
    :param prefill_rounds: seconds, by round
    :param decode_rounds: seconds of the decode, by round
    """

    engine: Engine
    path: str
    device: str
    batch: int
    prompt_length: int
    new_tokens: int
    prefill_seconds: Quartiles
    decode_tokens_per_second: Quartiles
    tokens_per_second: Quartiles
    peak_nbytes: int | None = None
    peak_method: str | None = None
    prefill_rounds: list[float] = Field(repr=False)
    decode_rounds: list[float] = Field(repr=False)


class SpeedComparison(BaseModel):
    """A compressed model beside its base, at one shape in one engine.

    :param context: tokens of a sequence in the middle of its decode, where bytes are counted
    :param base_bytes_per_token: bytes that the base reads per decoded token, routing taken for uniform unless
        shares were given
    :param bytes_ratio: the base's bytes over the compressed model's: the speed-up of decode that bytes allow
    :param reached_ratio: the speed-up of decode that was measured: median over rounds of the compressed model's
        throughput over the base's in the same round
    :param reached_quartiles: its spread
    :param prefill_ratio: the base's time for the prompt over the compressed model's, in the same way
    """

    base: Latency
    compressed: Latency
    context: int
    base_bytes_per_token: float
    compressed_bytes_per_token: float
    bytes_ratio: float
    reached_ratio: float
    reached_quartiles: Quartiles
    prefill_ratio: Quartiles

    @property
    def engine(self) -> Engine:
        """Where both were measured."""
        return self.base.engine


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

    :param engines: transformers, and vLLM where ``vllm_python`` is given, unless told
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


def compare_latencies(
    base: Latency,
    compressed: Latency,
    base_cost: ModelCost,
    compressed_cost: ModelCost,
    *,
    base_routing: Mapping[int, Sequence[float]] | None = None,
    compressed_routing: Mapping[int, Sequence[float]] | None = None,
) -> SpeedComparison:
    """Set two models that took turns beside each other, and beside what their bytes allow.

    :raises ValueError: they were not measured in the same engine, shape and rounds
    """
    for field in ("engine", "device", "batch", "prompt_length", "new_tokens"):
        ours, theirs = getattr(compressed, field), getattr(base, field)
        if ours != theirs:
            raise ValueError(
                f"{field} is {theirs!r} for the base and {ours!r} for the compressed model; compare what was "
                "measured alike."
            )
    if len(base.decode_rounds) != len(compressed.decode_rounds):
        raise ValueError(
            f"the base has {len(base.decode_rounds)} rounds, the compressed model "
            f"{len(compressed.decode_rounds)}; measure them in one call."
        )
    context = base.prompt_length + base.new_tokens // 2
    before = base_cost.decode_at(base.batch, context, base_routing).per_token
    after = compressed_cost.decode_at(base.batch, context, compressed_routing).per_token
    reached = Quartiles.of(
        [slow / fast for slow, fast in zip(base.decode_rounds, compressed.decode_rounds, strict=True)]
    )
    return SpeedComparison(
        base=base,
        compressed=compressed,
        context=context,
        base_bytes_per_token=before,
        compressed_bytes_per_token=after,
        bytes_ratio=before / after,
        reached_ratio=reached.median,
        reached_quartiles=reached,
        prefill_ratio=Quartiles.of(
            [slow / fast for slow, fast in zip(base.prefill_rounds, compressed.prefill_rounds, strict=True)]
        ),
    )


def take_turns(
    load: Sequence[Callable[[], Runner]],
    prompts: Sequence[Sequence[Sequence[int]]],
    settings: SpeedSettings,
) -> list[list[list[Turn]]]:
    """Let models take turns at every shape, after turns that warm up and do not count.

    Who begins a round changes from round to round, so that none always runs in another's wake.

    :param load: loads each model
    :param prompts: token ids of each shape, [sequences][tokens]
    :return: turns by model, shape and round
    """
    turns: list[list[list[Turn]]] = [[[] for _ in prompts] for _ in load]
    # Loaded once a model warms up once, else whenever it is loaded.
    warm_ups = 1 if settings.together else settings.rounds
    total = (settings.rounds + warm_ups) * len(load) * len(prompts)
    with contextlib.ExitStack() as stack, tqdm(total=total, desc="Measuring speed", unit="turn") as bar:

        def turn(runner: Runner, shape: int) -> Turn:
            taken = runner.turn(prompts[shape], settings.new_tokens)
            bar.update()
            return taken

        if settings.together:
            runners = [_loaded(stack, make) for make in load]
            for runner in runners:
                for shape in range(len(prompts)):
                    turn(runner, shape)
            for order in _orders(len(load), settings.rounds):
                for shape in range(len(prompts)):
                    for model in order:
                        turns[model][shape].append(turn(runners[model], shape))
            return turns
        for order in _orders(len(load), settings.rounds):
            for model in order:
                with contextlib.ExitStack() as alone:
                    runner = _loaded(alone, load[model])
                    for shape in range(len(prompts)):
                        turn(runner, shape)
                    for shape in range(len(prompts)):
                        turns[model][shape].append(turn(runner, shape))
    return turns


def _orders(models: int, rounds: int) -> Iterator[list[int]]:
    """Who comes when, in each round."""
    for start in range(rounds):
        yield [(start + place) % models for place in range(models)]


def _loaded(stack: contextlib.ExitStack, make: Callable[[], Runner]) -> Runner:
    runner = make()
    stack.callback(runner.close)
    return runner


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
