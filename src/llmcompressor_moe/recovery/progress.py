"""What a run has seen and won back so far: the log of a recovery, as plain data."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmcompressor_moe.checkpoint.files import write_text

__all__ = ["LOG_FILE", "LogEntry", "Progress", "gap_closed"]

LOG_FILE = "log.jsonl"


class LogEntry(BaseModel):
    """One line of the log: the losses since the line before, or a look at held-out text, or both.

    :param step: optimizer steps done
    :param tokens: tokens trained on
    :param seconds: of training, over all runs that it took
    :param loss: the weighted sum, mean over steps since the last entry that has it, micro-batches and ranks
    :param parts: each loss before its weight, the same mean
    :param learning_rate: of the last of these steps
    :param gradient_norm: before clipping, of the last of these steps
    :param heldout_nll: nats per held-out token
    :param gap_closed: see `gap_closed`
    """

    model_config = ConfigDict(extra="forbid")

    step: int
    tokens: int
    seconds: float
    loss: float | None = None
    parts: dict[str, float] = {}
    learning_rate: float | None = None
    gradient_norm: float | None = None
    heldout_nll: float | None = None
    gap_closed: float | None = None


class Progress(BaseModel):
    """The log of a run, interrupted ones included.

    :param teacher_nll: nats per held-out token of the teacher; None without one
    :param entries: oldest first
    """

    model_config = ConfigDict(extra="forbid")

    teacher_nll: float | None = None
    entries: list[LogEntry] = []

    @property
    def start_nll(self) -> float | None:
        """Nats per held-out token of the student before training; None before it was measured."""
        return next((entry.heldout_nll for entry in self.entries if entry.heldout_nll is not None), None)

    @property
    def last_nll(self) -> float | None:
        """Nats per held-out token when it was measured last."""
        measured = [entry.heldout_nll for entry in self.entries if entry.heldout_nll is not None]
        return measured[-1] if measured else None

    @property
    def seconds(self) -> float:
        """Seconds of training behind the log."""
        return self.entries[-1].seconds if self.entries else 0.0

    def add(self, entry: LogEntry) -> LogEntry:
        """Append an entry, with the gap closed where held-out text was measured."""
        if entry.heldout_nll is not None:
            start = entry.heldout_nll if self.start_nll is None else self.start_nll
            entry.gap_closed = gap_closed(start, entry.heldout_nll, self.teacher_nll)
        self.entries.append(entry)
        return entry

    def write_log(self, directory: str | Path) -> None:
        """Write one JSON object a line, as a whole."""
        lines = [entry.model_dump_json(exclude_none=True) for entry in self.entries]
        write_text(Path(directory) / LOG_FILE, "".join(f"{line}\n" for line in lines))


def gap_closed(start: float, now: float, teacher: float | None) -> float | None:
    """The share of what was lost that is back: (start - now) / (start - teacher), all in nats per token.

    1: as good as the teacher on this text; above 1: better; below 0: worse than before training.

    :return: None without a teacher, or where the student was no worse than the teacher to begin with
    """
    if teacher is None or not start > teacher or not math.isfinite(start):
        return None
    return (start - now) / (start - teacher)
