"""Trade-off curves as PNG, for documents and slides; the page draws its own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompressor_moe.checkpoint.files import write_bytes
from llmcompressor_moe.sweep.curves import KINDS, Curve, CurvePoint, trade_off_curves
from llmcompressor_moe.sweep.geometry import Box, Label, axis_for, place_labels, step_boxes, text_width
from llmcompressor_moe.sweep.report import SweepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PlotsMissingError", "write_plots"]

# Kind -> marker of matplotlib, colour: the page's shapes and colours.
_STYLES = {
    "base": ("*", "#1b1f24"),
    "blocks": ("s", "#0067a5"),
    "layers": ("^", "#b84600"),
    "experts": ("o", "#00735a"),
    "bits": ("D", "#8c3b7c"),
    "combination": ("P", "#7a5c00"),
}
_LABEL_POINTS = 8.5


class PlotsMissingError(ImportError):
    """Plots need matplotlib, which is not installed."""


def write_plots(report: SweepReport, directory: str | Path) -> list[Path]:
    """Draw perplexity against size of the weight files, against bytes read per decoded token and, where it was
    measured, against time.

    :param directory: gets ``trade-off-size.png``, ``-reads.png`` and ``-time.png``; a curve without any finite
        perplexity is left out
    :return: the files written
    :raises PlotsMissingError: matplotlib is not installed
    :raises OutputDirectoryError: a file cannot be written
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotsMissingError(
            "plots need matplotlib, which is not installed: pip install llmcompressor-moe[plots]"
        ) from error
    written = []
    for curve in trade_off_curves(report):
        if curve.points:
            path = Path(directory) / f"trade-off-{curve.key}.png"
            write_bytes(path, _png(curve))
            written.append(path)
    return written


def _png(curve: Curve) -> bytes:
    # Figures by themselves: pyplot would choose a backend for the whole process and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, curve)
    figure.draw_without_rendering()
    _label(axes, curve)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: Axes, curve: Curve) -> None:
    front = curve.front_points
    on_front = set(curve.front)
    axes.step(
        [point.x for point in front],
        [point.y for point in front],
        where="post",
        color="#1b1f24",
        linewidth=1.2,
        zorder=2,
        label="Pareto front (points filled)",
    )
    for kind, name in KINDS.items():
        for filled in (False, True):
            points = [p for p in curve.points if p.kind == kind and (p.name in on_front) == filled]
            _scatter(axes, points, kind, filled)
        if any(point.kind == kind for point in curve.points):
            _scatter(axes, [], kind, True, label=name)
    for values, log, where in (
        ([p.x for p in curve.points], axes.set_xscale, axes.set_xlim),
        ([p.y for p in curve.points], axes.set_yscale, axes.set_ylim),
    ):
        axis = axis_for(values, 0, 1)
        if axis.log:
            log("log")
        where(axis.low, axis.high)
        ticks = axes.xaxis if where == axes.set_xlim else axes.yaxis
        ticks.set_ticks(axis.ticks, [f"{tick:g}" for tick in axis.ticks])
        ticks.set_ticks([], minor=True)
    axes.set_xlabel(f"{curve.cost} ({curve.unit}), less is better")
    axes.set_ylabel("Held-out perplexity, less is better")
    axes.set_title(curve.title)
    axes.grid(color="#c9d0d8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8.5)


def _scatter(axes: Axes, points: Sequence[CurvePoint], kind: str, filled: bool, label: str = "") -> None:
    shape, colour = _STYLES[kind]
    axes.scatter(
        [point.x for point in points],
        [point.y for point in points],
        s=130 if kind == "base" else 45,
        marker=shape,
        facecolors=colour if filled else "white",
        edgecolors=colour,
        linewidths=1.3,
        zorder=4 if filled else 3,
        label=label or "_nolegend_",
    )


def _label(axes: Axes, curve: Curve) -> None:
    """Name the points of the front and the untouched model where there is room, in pixels."""
    pixels = axes.figure.dpi / 72

    def place(point: CurvePoint) -> tuple[float, float]:
        x, y = axes.transData.transform((point.x, point.y))
        return x, -y

    def box(extent: tuple[float, float, float, float]) -> Box:
        left, bottom, right, top = extent
        return Box(left, -top, right, -bottom)

    front = curve.front_points
    wanted = [*front, *(p for p in curve.points if p.kind == "base" and p not in front)]
    size = _LABEL_POINTS * pixels
    obstacles = [
        *(
            Box(x - 5 * pixels, y - 5 * pixels, x + 5 * pixels, y + 5 * pixels)
            for x, y in map(place, curve.points)
        ),
        *step_boxes([place(point) for point in front]),
        box(axes.get_legend().get_window_extent().extents),
    ]
    placed = place_labels(
        [
            Label(*place(point), [text_width(text, size) for text in (point.label, point.code)], size * 1.15)
            for point in wanted
        ],
        obstacles,
        box(axes.get_window_extent().extents),
        8 * pixels,
    )
    for point, found in zip(wanted, placed, strict=True):
        if found is not None:
            anchor = (found.x, -(found.box.top + found.box.bottom) / 2)
            axes.annotate(
                (point.label, point.code)[found.choice],
                axes.transData.inverted().transform(anchor),
                fontsize=_LABEL_POINTS,
                ha={"start": "left", "middle": "center", "end": "right"}[found.anchor],
                va="center",
                zorder=5,
            )
