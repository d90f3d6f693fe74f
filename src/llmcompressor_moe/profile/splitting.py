"""Calibration batches that nothing is decided on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["in_fixed_order", "split_held_out"]

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


def _fingerprint(batch: dict[str, Any]) -> str:
    return hashlib.sha256(batch["input_ids"].cpu().contiguous().numpy().tobytes()).hexdigest()
