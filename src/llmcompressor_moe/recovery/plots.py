"""The curves of a recovery as PNG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from llmcompressor_moe.recovery.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLOT_FILE", "curves_png"]

PLOT_FILE = "recovery.png"
_INK, _GRID = "#1b1f24", "#c9d0d8"
_PARTS = ("#0067a5", "#b84600", "#00735a", "#8c3b7c", "#7a5c00", "#5a6472")


def curves_png(progress: Progress) -> bytes | None:
    """Held-out likelihood with where it came from and where the teacher is, and each loss, over tokens seen.

    :return: None where matplotlib is not installed
    """
    try:
        # Figures by themselves: pyplot would choose a backend for the whole process and keep every figure.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    _draw_heldout(above, progress)
    _draw_losses(below, progress)
    below.set_xlabel("Tokens seen")
    for axes in (above, below):
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_heldout(axes: Axes, progress: Progress) -> None:
    measured = [entry for entry in progress.entries if entry.heldout_nll is not None]
    axes.plot(
        [entry.tokens for entry in measured],
        [entry.heldout_nll for entry in measured],
        marker="o",
        color=_INK,
        label="student",
    )
    for level, name, style in (
        (progress.start_nll, "student before", ":"),
        (progress.teacher_nll, "teacher", "--"),
    ):
        if level is not None:
            axes.axhline(level, color=_INK, linestyle=style, linewidth=1, label=name)
    closed = measured[-1].gap_closed if measured else None
    axes.set_title("Held-out text" + ("" if closed is None else f": {closed:.0%} of the gap closed"))
    axes.set_ylabel("Nats per token")


def _draw_losses(axes: Axes, progress: Progress) -> None:
    logged = [entry for entry in progress.entries if entry.loss is not None]
    tokens = [entry.tokens for entry in logged]
    axes.plot(tokens, [entry.loss for entry in logged], color=_INK, linewidth=1.6, label="loss")
    names = dict.fromkeys(name for entry in logged for name in entry.parts)
    for place, name in enumerate(names):
        axes.plot(
            tokens,
            [entry.parts.get(name, float("nan")) for entry in logged],
            color=_PARTS[place % len(_PARTS)],
            linewidth=1,
            label=f"{name} (before its weight)",
        )
    if any(value > 0 for entry in logged for value in (entry.loss, *entry.parts.values())):
        axes.set_yscale("log")
    axes.set_title("Training losses")
    axes.set_ylabel("Mean per token")
