"""What single changes of a model, each alone, do to its output: one pass over the weights for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from llmcompressor_moe.profile.changes import Change
from llmcompressor_moe.profile.data import require_finite
from llmcompressor_moe.profile.divergence import token_divergence
from llmcompressor_moe.profile.forward import batch_mask, run_batches, sum_over_ranks
from llmcompressor_moe.profile.lockstep import Fork

__all__ = ["Variant", "divergence_of", "passes_of"]


@dataclass(frozen=True)
class Variant:
    """A model with one change.

    :param block: index of the block that is changed
    """

    block: int
    change: Change


def divergence_of(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Any]],
    variants: Sequence[Variant],
    *,
    share: float = 1.0,
    description: str | None = "Measuring curves",
) -> tuple[list[float], int]:
    """Mean over tokens of KL(model || variant) in nats, for each variant, and the number of tokens; over all
    ranks.

    A variant computes from its block on, with the hidden states that the model enters the block with. So all of
    them together cost `passes_of` passes over ``batches``, and the weights are read once. Hidden states of all
    variants that have begun wait between blocks; of logits, those of one batch and one variant are held.

    :param share: of the calibration data, that ``batches`` are, for the progress bar
    :raises FloatingPointError: the output is NaN or infinite
    """
    forks = [
        Fork(batch, variant.block, variant.change) for batch in range(len(batches)) for variant in variants
    ]
    sums = torch.zeros(len(variants) + 1, dtype=torch.float64)
    intact: dict[int, torch.Tensor] = {}
    missing = Counter({batch: len(variants) for batch in range(len(batches))})

    def compare(index: int, logits: torch.Tensor) -> None:
        if index < len(batches):
            intact[index] = logits
            return
        batch, variant = divmod(index - len(batches), len(variants))
        nats, tokens = token_divergence(intact[batch], logits, batch_mask(batches[batch]))
        sums[variant] += nats
        missing[batch] -= 1
        if not missing[batch]:
            sums[-1] += tokens
            del intact[batch]

    run_batches(model, batches, None, description, on_logits=compare, forks=forks, share=share)
    *totals, tokens = sum_over_ranks(sums).tolist()
    means = [total / max(tokens, 1.0) for total in totals]
    for variant, mean in zip(variants, means, strict=True):
        require_finite(mean, "kl", variant.block)
    return means, int(tokens)


def passes_of(blocks: Sequence[int], num_blocks: int) -> float:
    """Passes through all blocks that one batch takes with its variants.

    :param blocks: index of the block that each variant changes
    """
    return 1 + sum(num_blocks - block for block in blocks) / num_blocks
