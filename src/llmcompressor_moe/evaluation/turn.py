"""What one model's turn at a measurement is, whatever engine runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Runner", "Turn"]


@dataclass(frozen=True)
class Turn:
    """One prefill and the decode after it.

    :param prefill_seconds: from the prompts to the first new token of every sequence
    :param decode_seconds: from there to the last one
    :param device: what it ran on
    :param peak_nbytes: the most memory in use meanwhile, the model with it; None where the engine cannot tell
    :param peak_method: how that was measured
    """

    prefill_seconds: float
    decode_seconds: float
    device: str
    peak_nbytes: int | None = None
    peak_method: str | None = None


class Runner(Protocol):
    """A loaded model that takes turns."""

    def turn(self, rows: Sequence[Sequence[int]], new_tokens: int) -> Turn:
        """Continue rows of token ids, equally long, greedily by ``new_tokens`` each."""

    def close(self) -> None:
        """Let go of the model."""
