"""Sums that grow where their summands are."""

from __future__ import annotations

import torch

__all__ = ["Tally"]


class Tally:
    """A float64 sum that grows on the device of its summands and moves to the CPU when it is asked for, because
    each move makes the CPU wait for the device.
    """

    def __init__(self, *shape: int) -> None:
        self._total = torch.zeros(*shape, dtype=torch.float64)
        self._growing: torch.Tensor | None = None

    def add(self, values: torch.Tensor, row: int | slice = slice(None)) -> None:
        """Add to the whole, or to one row or some rows of it."""
        if self._growing is None:
            self._growing = torch.zeros(self._total.shape, dtype=torch.float64, device=values.device)
        self._growing[row] += values

    @property
    def total(self) -> torch.Tensor:
        """The sum so far, on the CPU: always the same tensor."""
        if self._growing is not None:
            self._total += self._growing.cpu()
            self._growing = None
        return self._total
