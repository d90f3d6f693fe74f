"""How fast models were, and how that compares with what their bytes would allow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from llmcompressor_moe.evaluation.cost import ModelCost
from llmcompressor_moe.report import ShownPath

__all__ = ["Engine", "Latency", "Quartiles", "SpeedComparison", "SpeedSettings", "compare_latencies"]

Engine = Literal["transformers", "vllm"]


class SpeedSettings(BaseModel):
    """What is measured.

    :param batch_sizes: sequences at once
    :param prompt_lengths: tokens of each prompt; every batch size is measured with every length
    :param new_tokens: tokens that each sequence is continued by; the first comes from the prefill
    :param rounds: turns per model and shape that count
    :param together: keep all models loaded; else each is loaded again for its turns in every round, for models
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
    path: ShownPath
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
