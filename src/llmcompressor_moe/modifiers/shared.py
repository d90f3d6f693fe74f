"""One calibration pass for the drop modifiers that stand in a row."""

from __future__ import annotations

from collections.abc import Callable

from llmcompressor_moe.profile import Profile, Statistic
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["SharedPass"]


class SharedPass:
    """Collects what is wanted from one pass; the first who asks for the result runs it."""

    def __init__(self) -> None:
        self._wanted: set[Statistic] = set()
        self._run_length: int | None = None
        self._profile: Profile | None = None
        # Original indices of the experts behind the columns of the profile: layer -> indices.
        self.expert_ids: dict[int, list[int]] = {}
        # MoE layers that were there when the profile was taken.
        self.layers: set[int] = set()

    def add(self, wanted: set[Statistic], run_length: int | None) -> bool:
        """Ask for statistics; False when one pass cannot serve both (runs of another length)."""
        if run_length is not None and self._run_length not in (None, run_length):
            return False
        self._wanted |= wanted
        self._run_length = run_length or self._run_length
        return True

    def get(self, session: TrimSession, measure: Callable[[set[Statistic], int | None], Profile]) -> Profile:
        """The profile; measured when it is asked for the first time."""
        if self._profile is None:
            self.expert_ids = {layer: session.expert_ids(layer) for layer in session.layers}
            self.layers = set(session.layers)
            self._profile = measure(self._wanted, self._run_length)
        return self._profile
