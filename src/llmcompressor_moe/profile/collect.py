"""One forward pass over calibration data that gathers every statistic asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from llmcompressor_moe.profile.data import Profile, Statistic
from llmcompressor_moe.profile.forward import sum_over_ranks, tokens_of
from llmcompressor_moe.profile.observers import BlockObserver, ExpertsObserver, RunObserver
from llmcompressor_moe.profile.observing import observe_batches
from llmcompressor_moe.profile.resumable import ResumablePass
from llmcompressor_moe.topology import Topology

__all__ = ["collect_profile"]


def collect_profile(
    model: PreTrainedModel,
    topology: Topology,
    batches: Iterable[dict[str, Any]],
    statistics: Collection[Statistic],
    *,
    run_length: int | None = None,
    skip_blocks: Collection[int] = (),
    skip_layers: Collection[int] = (),
    resumable: ResumablePass | None = None,
) -> Profile:
    """Run ``model`` once over ``batches`` and return its statistics, summed over all ranks.

    :param topology: the model's topology, experts linearized
    :param statistics: what to collect; nothing else costs anything
    :param run_length: blocks per run for ``Statistic.RUN``
    :param skip_blocks: blocks already dropped; they have no statistics and runs close over them
    :param skip_layers: MoE layers already dropped
    :param resumable: where the pass is kept; it goes on from there, or is not run when it has finished before
    :raises OSError: it cannot be kept
    :raises FloatingPointError: activations are NaN or infinite
    :raises ValueError: ``batches`` holds no token
    """
    known = resumable.result() if resumable is not None else None
    if known is not None:
        return Profile.model_validate(known)
    wanted = set(statistics)
    live = [block for block in topology.blocks if block.index not in set(skip_blocks)]
    layers = [block for block in live if block.moe is not None and block.index not in set(skip_layers)]
    blocks = BlockObserver(model, live, layers if Statistic.LAYER in wanted else [])
    runs = RunObserver(model, live, run_length) if Statistic.RUN in wanted and run_length else None
    experts = {}
    if wanted & {Statistic.ROUTING, Statistic.OUTPUT, Statistic.REDUNDANCY}:
        experts = {block.index: ExpertsObserver(model, block, wanted) for block in layers}
    observers = [
        *([blocks] if wanted & {Statistic.BLOCK, Statistic.LAYER} else []),
        *([runs] if runs else []),
        *experts.values(),
    ]
    seen: dict[int, tuple[int, int]] = {}

    def count(index: int, batch: dict[str, Any]) -> None:
        seen[index] = (len(batch["input_ids"]), tokens_of(batch))

    observe_batches(model, observers, batches, "Profiling", on_batch=count, resumable=resumable)
    samples, tokens = (sum(column) for column in zip(*seen.values(), strict=True)) if seen else (0, 0)
    samples, tokens = sum_over_ranks(torch.tensor([samples, tokens], dtype=torch.float64)).long().tolist()
    if not tokens:
        raise ValueError(
            "The calibration dataset is empty: pass `dataset=` with at least one tokenized sequence."
        )
    profile = Profile(
        num_tokens=tokens,
        num_samples=samples,
        block_similarity=blocks.block_similarity() if Statistic.BLOCK in wanted else {},
        layer_similarity=blocks.layer_similarity() if Statistic.LAYER in wanted else {},
        run_similarity=runs.similarity() if runs else {},
        run_length=run_length if runs else None,
        experts={index: observer.profile() for index, observer in experts.items()},
    )
    profile.check_finite()
    if resumable is not None:
        resumable.finish(profile.model_dump(mode="json"))
    return profile
