"""What the model's output loses when one part alone is gone: the ``kl`` metric."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from llmcompressor_moe.profile.computing import available_memory
from llmcompressor_moe.profile.data import require_finite
from llmcompressor_moe.profile.forward import batch_mask, run_batches, sum_over_ranks, tokens_of
from llmcompressor_moe.profile.lockstep import Snapshot
from llmcompressor_moe.progress import progress
from llmcompressor_moe.surgery.bypass import bypassed, pass_through, silence
from llmcompressor_moe.topology import Topology, text_config

__all__ = ["divergence_without", "kl_divergence", "token_divergence"]

# Logits that are in the dtype of the sum at a time: 64 MB in fp32 for each of both models.
_CHUNK = 1 << 24


def token_divergence(
    reference: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None
) -> tuple[float, int]:
    """Sum over tokens of KL(reference || other) in nats, and the number of tokens.

    :param reference: logits [batch, sequence, vocabulary] of the intact model
    :param other: logits of the same shape
    :param mask: boolean [batch, sequence], False for padding
    """
    found = kl_divergence(reference.flatten(0, -2), other.flatten(0, -2), torch.float32)
    if mask is not None:
        found = found[mask.reshape(-1).to(found.device)]
    return float(found.sum(dtype=torch.float64)), len(found)


def kl_divergence(
    reference: torch.Tensor, other: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """KL(reference || other) = sum p log(p / q) per row, in nats (Kullback and Leibler, 1951).

    A few rows at a time are copied to ``dtype``, never all of them.

    :param reference: logits, [rows, vocabulary]; -inf is probability zero
    :param other: the same of the other distribution, on the same device
    :param dtype: of softmax, sum and result
    :return: [rows], infinite where the other distribution excludes what the reference may say
    """
    rows = max(1, _CHUNK // reference.shape[-1])
    found = torch.empty(len(reference), dtype=dtype, device=reference.device)
    for into, ours, theirs in zip(found.split(rows), reference.split(rows), other.split(rows), strict=True):
        log_p, log_q = (logits.to(dtype).log_softmax(-1) for logits in (ours, theirs))
        p = log_p.exp()
        # p log p is 0 at p = 0; and a rounding error must not make a divergence negative.
        into.copy_(torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp_min(0.0))
    return found


def divergence_without(
    model: PreTrainedModel,
    topology: Topology,
    batches: Sequence[dict[str, Any]],
    candidates: Iterable[tuple[int, ...]],
    part: str,
) -> dict[int, float]:
    """Mean over tokens of KL(intact || without the part), for each part on its own.

    Blocks before the part are not run again: what enters the part is kept from the intact run, so that all L parts
    together cost about L/2 forward passes over ``batches``. Parts that are bypassed already stay so, in the
    reference as well.

    :param candidates: block indices that go together: one for a block or an MoE layer, several for a run of
        blocks
    :param part: "block" or "layer"
    :return: first index of each candidate -> divergence in nats
    :raises FloatingPointError: the model's output is NaN or infinite
    """
    candidates = list(candidates)
    sums = torch.zeros(len(candidates) + 1, dtype=torch.float64)
    firsts = {indices[0] for indices in candidates}
    groups = _groups(batches, _token_bytes(model, len(firsts)), available_memory("cpu") // 4)
    with progress(len(groups) * len(candidates), "Divergence") as advance:
        for group in groups:
            intact = _run_intact(model, group, firsts)
            for position, indices in enumerate(candidates):
                with contextlib.ExitStack() as stack:
                    for index in indices:
                        stack.enter_context(_without(model, topology, index, part))
                    sums[position] += _divergence(model, group, intact, indices[0])
                advance(1)
            sums[-1] += sum(tokens_of(batch) for batch in group)
    sums = sum_over_ranks(sums)
    divergence = {
        indices[0]: float(total / sums[-1]) for indices, total in zip(candidates, sums, strict=False)
    }
    for index, value in divergence.items():
        require_finite(value, "kl", index)
    return divergence


@dataclass
class _Intact:
    """What the intact model did with some batches.

    :param logits: of each batch
    :param entering: block index -> batch -> what the block before it returned
    """

    logits: list[torch.Tensor]
    entering: dict[int, dict[int, Any]]


def _run_intact(model: PreTrainedModel, batches: Sequence[dict[str, Any]], firsts: set[int]) -> _Intact:
    found = _Intact([], {})

    def keep(block: int, snapshot: Snapshot) -> None:
        if block + 1 in firsts:
            # Copies: some blocks work on their input in place.
            found.entering[block + 1] = tree_map_only(torch.Tensor, torch.clone, snapshot())

    run_batches(
        model,
        batches,
        None,
        None,
        on_logits=lambda _, logits: found.logits.append(logits),
        on_block_done=keep,
    )
    return found


def _divergence(
    model: PreTrainedModel, batches: Sequence[dict[str, Any]], intact: _Intact, first: int
) -> float:
    """Sum over all tokens, with some parts bypassed, the first of them in block ``first``."""
    totals = []

    def compare(index: int, logits: torch.Tensor) -> None:
        totals.append(token_divergence(intact.logits[index], logits, batch_mask(batches[index]))[0])

    run_batches(
        model,
        batches,
        None,
        None,
        on_logits=compare,
        start_block=first,
        resume=tree_map_only(torch.Tensor, torch.clone, intact.entering.get(first)),
    )
    return sum(totals)


def _token_bytes(model: PreTrainedModel, entries: int) -> int:
    """What `_Intact` takes per token, at most."""
    config = text_config(model.config)
    return 4 * (config.vocab_size + entries * config.hidden_size)


def _groups(batches: Sequence[dict[str, Any]], token_bytes: int, memory: int) -> list[list[dict[str, Any]]]:
    """Batches that are looked at together, at least one at a time."""
    groups: list[list[dict[str, Any]]] = []
    room = 0
    for batch in batches:
        size = batch["input_ids"].numel() * token_bytes
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(batch)
        room -= size
    return groups


def _without(
    model: PreTrainedModel, topology: Topology, index: int, part: str
) -> contextlib.AbstractContextManager:
    block = topology.blocks[index]
    module = model.get_submodule(block.name if part == "block" else block.moe.module)
    return bypassed(module, pass_through(module) if part == "block" else silence(module))
