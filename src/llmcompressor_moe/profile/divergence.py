"""What the model's output loses when one part alone is gone: the ``kl`` metric."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from llmcompressor_moe.profile.data import require_finite
from llmcompressor_moe.profile.forward import batch_mask, run_once, sum_over_ranks
from llmcompressor_moe.profile.observing import hidden_argument
from llmcompressor_moe.surgery.bypass import bypassed, pass_through, replace_hidden, silence
from llmcompressor_moe.topology import Topology

__all__ = ["divergence_without", "token_divergence"]


def token_divergence(
    reference: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None
) -> tuple[float, int]:
    """Sum over tokens of KL(reference || other) in nats, and the number of tokens.

    :param reference: logits [batch, sequence, vocabulary] of the intact model
    :param other: logits of the same shape
    :param mask: boolean [batch, sequence], False for padding
    """
    log_p = reference.float().log_softmax(-1)
    log_q = other.float().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    if mask is not None:
        divergence = divergence[mask.to(divergence.device)]
    return float(divergence.sum(dtype=torch.float64)), divergence.numel()


def divergence_without(
    model: PreTrainedModel,
    topology: Topology,
    batches: Sequence[dict[str, Any]],
    candidates: Iterable[tuple[int, ...]],
    part: str,
) -> dict[int, float]:
    """Mean over tokens of KL(intact || without the part), for each part on its own.

    Blocks before the part are not run again: the hidden states that enter the part are kept from the intact
    run, so that all L parts together cost about L/2 forward passes over ``batches``. Parts that are bypassed
    already stay so, in the reference as well.

    :param candidates: block indices that go together: one for a block or an MoE layer, several for a run of
        blocks
    :param part: "block" or "layer"
    :return: first index of each candidate -> divergence in nats
    :raises FloatingPointError: the model's output is NaN or infinite
    """
    candidates = list(candidates)
    sums = torch.zeros(len(candidates) + 1, dtype=torch.float64)
    blocks = [model.get_submodule(block.name) for block in topology.blocks]
    for batch in tqdm(batches, desc="Divergence", leave=False):
        with _entering_hidden_states(blocks) as entering:
            reference = run_once(model, batch)
        mask = batch_mask(batch)
        tokens = 0
        for position, indices in enumerate(candidates):
            with contextlib.ExitStack() as stack:
                for earlier in blocks[: indices[0]]:
                    stack.enter_context(bypassed(earlier, pass_through(earlier)))
                if indices[0] in entering:
                    # The last block before the part hands over what the intact model gave.
                    stack.enter_context(_entering(blocks[: indices[0]], entering[indices[0]]))
                for index in indices:
                    stack.enter_context(_without(model, topology, index, part))
                total, tokens = token_divergence(reference, run_once(model, batch), mask)
            sums[position] += total
        sums[-1] += tokens
    sums = sum_over_ranks(sums)
    divergence = {
        indices[0]: float(total / sums[-1]) for indices, total in zip(candidates, sums, strict=False)
    }
    for index, value in divergence.items():
        require_finite(value, "kl", index)
    return divergence


@contextlib.contextmanager
def _entering_hidden_states(blocks: Sequence[nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Keep what enters each block but the first during one forward pass."""
    entering: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering[index] = hidden_argument(args, kwargs)

        return hook

    handles = [
        block.register_forward_pre_hook(keep(index), with_kwargs=True)
        for index, block in enumerate(blocks)
        if index
    ]
    try:
        yield entering
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _entering(earlier: Sequence[nn.Module], hidden_states: torch.Tensor) -> Iterator[None]:
    """Make the last of the blocks that are passed over hand on the given hidden states."""
    last = earlier[-1]
    handle = last.register_forward_hook(lambda _module, _args, output: replace_hidden(output, hidden_states))
    try:
        yield
    finally:
        handle.remove()


def _without(
    model: PreTrainedModel, topology: Topology, index: int, part: str
) -> contextlib.AbstractContextManager:
    block = topology.blocks[index]
    module = model.get_submodule(block.name if part == "block" else block.moe.module)
    return bypassed(module, pass_through(module) if part == "block" else silence(module))
