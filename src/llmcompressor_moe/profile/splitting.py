"""Some of the calibration batches: those that nothing is decided on, those that something dear is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

__all__ = ["in_fixed_order", "some_samples", "split_held_out"]

# Enough to judge by, little enough to hold.
_TOKENS = 8192
_SHARE = 8


def split_held_out(
    batches: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bool]:
    """Batches to decide on, an eighth (8192 tokens at most) to judge by, and whether they differ.

    Which is which follows from what the batches hold, not from the order in which a shuffling loader gives them.
    """
    every = in_fixed_order(batches)
    if len(every) < 2:
        return every, every, False
    count, tokens = 0, 0
    while count < max(1, len(every) // _SHARE) and (not count or tokens < _TOKENS):
        count += 1
        tokens += every[-count]["input_ids"].numel()
    return every[:-count], every[-count:], True


def in_fixed_order(batches: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches in an order that follows from what they hold, however a shuffling loader gives them."""
    return sorted(batches, key=_fingerprint)


def some_samples(batches: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Samples with a share of the tokens, each as a batch of its own: no more than that, but at least one sample
    of those that are there.

    Which they are follows from what they hold, not from the order in which a shuffling loader gives them.
    """
    every = in_fixed_order(row for batch in batches for row in _rows(batch))
    room = share * sum(row["input_ids"].numel() for row in every) + 1e-6
    taken: list[dict[str, Any]] = []
    for row in every:
        room -= row["input_ids"].numel()
        if taken and room < 0:
            break
        taken.append(row)
    return taken


def _rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    count = len(batch["input_ids"])

    def row(value: Any, index: int) -> Any:
        per_row = isinstance(value, torch.Tensor) and value.ndim and len(value) == count
        return value[index : index + 1] if per_row else value

    return [{name: row(value, index) for name, value in batch.items()} for index in range(count)]


def _fingerprint(batch: dict[str, Any]) -> str:
    return hashlib.sha256(batch["input_ids"].cpu().contiguous().numpy().tobytes()).hexdigest()
