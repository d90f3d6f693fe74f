"""Charts as SVG that stands in an HTML page: text in, markup out, every value escaped.

Colours that must follow the page's scheme come from its style sheet by class; those of maps are the same on light
and dark pages. Nothing says anything by colour alone: kinds of points have shapes, dropped experts are hatched.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmcompressor_moe.sweep.curves import Curve, CurvePoint
from llmcompressor_moe.sweep.geometry import (
    Axis,
    Box,
    Label,
    axis_for,
    place_labels,
    round_ticks,
    step_boxes,
    text_width,
)
from llmcompressor_moe.sweep.png import data_uri, indexed_png

__all__ = [
    "BANDS",
    "COLOURS",
    "MARKERS",
    "MapRow",
    "StripRow",
    "cell_map",
    "definitions",
    "marker",
    "scatter",
    "strips",
    "swatch",
]

WIDTH = 420.0
_SIZE = 12.0

# Outlines around the origin, about 5 units in each direction.
MARKERS = {
    "base": "M0-7 1.7-2.3 6.7-2.2 2.7.9 4.1 5.7 0 2.8-4.1 5.7-2.7.9-6.7-2.2-1.7-2.3Z",
    "blocks": "M-4.4-4.4H4.4V4.4H-4.4Z",
    "layers": "M0-5.6 5.2 4.2H-5.2Z",
    "experts": "M-4.8 0A4.8 4.8 0 1 0 4.8 0 4.8 4.8 0 1 0-4.8 0Z",
    "bits": "M0-6 6 0 0 6-6 0Z",
    "combination": "M-2-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z",
}
"""Kind of point -> SVG path."""

COLOURS = (
    "#440154",
    "#481f70",
    "#443983",
    "#3b528b",
    "#31688e",
    "#287c8e",
    "#21918c",
    "#20a486",
    "#35b779",
    "#5ec962",
    "#90d743",
    "#c8e020",
    "#fde725",
)
"""viridis (https://bids.github.io/colormap/, CC0): as bright as the value is high, also in grey."""

_BOUNDS = (1 / 8, 1 / 4, 1 / 2, 0.7, 0.85, 0.95, 1.05, 1.2, 1.4, 2.0, 4.0, 8.0)
BANDS = (
    "below 1/8",
    "1/8 to 1/4",
    "1/4 to 1/2",
    "0.5 to 0.7",
    "0.7 to 0.85",
    "0.85 to 0.95",
    "0.95 to 1.05",
    "1.05 to 1.2",
    "1.2 to 1.4",
    "1.4 to 2",
    "2 to 4",
    "4 to 8",
    "8 and more",
)
"""What each of `COLOURS` stands for in a map of experts: multiples of an even share."""

_NOTHING, _GONE, _NEVER, _FIRST = range(4)
_PALETTE = [(0, 0, 0, 0), (150, 150, 150, 255), (255, 255, 255, 255)] + [
    (*bytes.fromhex(colour[1:]), 255) for colour in COLOURS
]
_MASK = [(0, 0, 0, 255), (255, 255, 255, 255)]


@dataclass(frozen=True)
class MapRow:
    """One MoE layer of a map of experts.

    :param block: index of its block
    :param values: one per expert, in multiples of an even share; None for an expert that is gone
    """

    block: int
    values: Sequence[float | None]


@dataclass(frozen=True)
class StripRow:
    """One statistic of a map of parts.

    :param title: what it is, with its unit
    :param values: block index -> value; blocks without one are left empty
    :param change: block index -> how much leaving the part out changes, above or equal to 0; gives the colour
    """

    title: str
    values: Mapping[int, float]
    change: Mapping[int, float]


def definitions() -> Markup:
    """Patterns that maps refer to; stands once in a page."""
    return Markup(
        '<svg class="definitions" aria-hidden="true" width="0" height="0"><defs>'
        '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="1.6" height="5"/></pattern>'
        '<pattern id="dots" width="4" height="4" patternUnits="userSpaceOnUse">'
        '<circle cx="2" cy="2" r=".9"/></pattern></defs></svg>'
    )


def marker(kind: str) -> Markup:
    """The shape of a kind of point by itself, for legends."""
    return Markup(
        '<svg class="key kind-{0}" viewBox="-8 -8 16 16" aria-hidden="true">'
        '<path class="mark front" d="{1}"/></svg>'
    ).format(kind, MARKERS[kind])


def swatch(what: str) -> Markup:
    """A cell of a map by itself, for legends.

    :param what: ``gone``, ``never``, or the number of one of `COLOURS`
    """
    fill = {"gone": "#969696", "never": "#fff"}.get(what) or COLOURS[int(what)]
    pattern = {"gone": "hatch", "never": "dots"}.get(what)
    over = Markup('<rect width="16" height="16" fill="url(#{})"/>').format(pattern) if pattern else ""
    return Markup(
        '<svg class="key" viewBox="0 0 16 16" aria-hidden="true"><rect width="16" height="16" fill="{}"/>{}</svg>'
    ).format(fill, over)


def scatter(curve: Curve, targets: Mapping[str, str], height: float = 340.0) -> Markup:
    """Points of a trade-off as links, the front as a line of steps.

    Points of the front are reached with Tab, the others have ``tabindex="-1"``.

    :param targets: name of a point -> what it links to
    :raises ValueError: the curve has no point
    """
    area = Box(46, 12, WIDTH - 14, height - 40)
    x = axis_for((point.x for point in curve.points), area.left, area.right)
    y = axis_for((point.y for point in curve.points), area.bottom, area.top)
    front = curve.front_points
    places = {point.name: (x.at(point.x), y.at(point.y)) for point in curve.points}
    steps = [places[point.name] for point in front]
    others = [point for point in curve.points if point.name not in set(curve.front)]
    description = (
        f"{len(curve.points)} points; less is better in both directions. The line joins the {len(front)} points "
        f"that no other beats, from {_point_text(front[0], curve)} to {_point_text(front[-1], curve)}."
        if front
        else f"{len(curve.points)} points."
    )
    return _svg(
        f"curve-{curve.key}",
        "chart curve",
        height,
        curve.title,
        description,
        _x_axis(x, area, f"{curve.cost} ({curve.unit})"),
        _y_axis(y, area, "Perplexity" + (" (logarithmic)" if y.log else "")),
        Markup('<path class="front-line" d="{}"/>').format(_steps(steps)),
        _join(_link(point, curve, places[point.name], targets, False) for point in others),
        _join(_link(point, curve, places[point.name], targets, True) for point in front),
        _labels(curve, front, places, area, steps),
    )


def strips(key: str, title: str, blocks: int, rows: Sequence[StripRow]) -> Markup:
    """Statistics of every block, one strip of cells each, brighter where leaving the part out changes more.

    Colours are logarithmic and each strip's own, from its smallest change to its largest.
    """
    width = max(WIDTH, 9.0 * blocks)
    cell = (width - 8) / blocks
    numbers = cell >= text_width("0.00", _SIZE - 2)
    strip, gap = 26.0, 22.0
    body = []
    for number, row in enumerate(rows):
        top = number * (strip + gap) + gap
        body.append(Markup('<text class="strip-title" x="4" y="{}">{}</text>').format(_n(top - 6), row.title))
        levels = _levels(row.change)
        for block in range(blocks):
            left = 4 + block * cell
            if block not in row.values:
                body.append(_empty_cell(left, top, cell, strip, f"block {block}: none"))
                continue
            level = levels[block]
            body.append(
                Markup(
                    '<rect x="{}" y="{}" width="{}" height="{}" fill="{}"><title>block {}: {}</title></rect>'
                ).format(
                    _n(left), _n(top), _n(cell), _n(strip), COLOURS[level], block, f"{row.values[block]:.3g}"
                )
            )
            if numbers:
                body.append(
                    Markup('<text class="in-cell" fill="{}" x="{}" y="{}">{}</text>').format(
                        "#fff" if level < 6 else "#000",
                        _n(left + cell / 2),
                        _n(top + strip / 2 + 4),
                        f"{row.values[block]:.2f}",
                    )
                )
    bottom = len(rows) * (strip + gap)
    every = max(1, math.ceil(text_width(str(blocks - 1), _SIZE) * 1.4 / cell))
    ticks = [
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            _n(4 + (block + 0.5) * cell), _n(bottom + 16), block
        )
        for block in range(0, blocks, every)
    ]
    name = Markup('<text class="axis-name" x="{}" y="{}" text-anchor="middle">Block</text>').format(
        _n(width / 2), _n(bottom + 33)
    )
    description = "; ".join(f"{row.title}: {_extremes(row)}" for row in rows)
    return _svg(
        key, "chart strips", bottom + 40, title, description, _join(body), _join(ticks), name, width=width
    )


def cell_map(key: str, title: str, description: str, rows: Sequence[MapRow]) -> Markup:
    """A map of layers by experts: the multiple of an even share by colour, experts that are gone hatched, those
    that are left and never chosen dotted.

    :param key: identifies the map in its page
    :raises ValueError: there is no expert at all
    """
    experts = max((len(row.values) for row in rows), default=0)
    if not experts:
        raise ValueError("a map needs at least one layer with an expert.")
    left, top = 38.0, 4.0
    cell = min(22.0, max(3.0, 260 / len(rows)))
    width, height = WIDTH - left - 4, cell * len(rows)
    cells = [[*map(_index, row.values), *[_NOTHING] * (experts - len(row.values))] for row in rows]
    where = Markup(' x="{}" y="{}" width="{}" height="{}"').format(_n(left), _n(top), _n(width), _n(height))
    every = max(1, math.ceil(1.1 * _SIZE / cell))
    body = [
        _image(cells, _PALETTE, where),
        _overlay(f"{key}-gone", cells, _GONE, "hatch", where),
        _overlay(f"{key}-never", cells, _NEVER, "dots", where),
        Markup('<rect class="frame"{}/>').format(where),
        *(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
                _n(left - 5), _n(top + (number + 0.5) * cell + 4), rows[number].block
            )
            for number in range(0, len(rows), every)
        ),
        *(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                _n(left + (tick + 0.5) * width / experts), _n(top + height + 15), f"{tick:g}"
            )
            for tick in _whole_ticks(experts)
        ),
        Markup('<text class="axis-name" x="{}" y="{}" text-anchor="middle">Expert</text>').format(
            _n(left + width / 2), _n(top + height + 31)
        ),
        Markup(
            '<text class="axis-name" transform="translate(10 {}) rotate(-90)" text-anchor="middle">Block</text>'
        ).format(_n(top + height / 2)),
    ]
    return _svg(key, "chart map", top + height + 38, title, description, *body)


def _svg(
    key: str,
    classes: str,
    height: float,
    title: str,
    description: str,
    *body: Markup,
    width: float = WIDTH,
) -> Markup:
    return Markup(
        '<svg class="{classes}" viewBox="0 0 {width} {height}" role="{role}" aria-labelledby="{key}-t" '
        'aria-describedby="{key}-d"><title id="{key}-t">{title}</title><desc id="{key}-d">{description}</desc>'
        "{body}</svg>"
    ).format(
        classes=classes,
        width=_n(width),
        height=_n(height),
        # What is inside an image is hidden from assistive technology, and curves have links inside.
        role="group" if "curve" in classes else "img",
        key=key,
        title=title,
        description=description,
        body=_join(body),
    )


def _x_axis(axis: Axis, area: Box, name: str) -> Markup:
    lines = [
        Markup(
            '<path class="grid" d="M{0} {1}V{2}"/>'
            '<text class="tick" x="{0}" y="{3}" text-anchor="middle">{4}</text>'
        ).format(_n(axis.at(tick)), _n(area.top), _n(area.bottom), _n(area.bottom + 15), f"{tick:g}")
        for tick in axis.ticks
    ]
    return _join(lines) + Markup(
        '<text class="axis-name" x="{}" y="{}" text-anchor="middle">{}</text>'
    ).format(_n((area.left + area.right) / 2), _n(area.bottom + 33), name)


def _y_axis(axis: Axis, area: Box, name: str) -> Markup:
    lines = [
        Markup(
            '<path class="grid" d="M{1} {0}H{2}"/><text class="tick" x="{3}" y="{4}" text-anchor="end">{5}</text>'
        ).format(
            _n(axis.at(tick)),
            _n(area.left),
            _n(area.right),
            _n(area.left - 5),
            _n(axis.at(tick) + 4),
            f"{tick:g}",
        )
        for tick in axis.ticks
    ]
    return _join(lines) + Markup(
        '<text class="axis-name" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>'
    ).format(_n((area.top + area.bottom) / 2), name)


def _steps(places: Sequence[tuple[float, float]]) -> str:
    if not places:
        return ""
    first, *others = places
    return f"M{_n(first[0])} {_n(first[1])}" + "".join(f"H{_n(x)}V{_n(y)}" for x, y in others)


def _point_text(point: CurvePoint, curve: Curve) -> str:
    return f"{point.label} ({point.x:.3g} {curve.unit}, perplexity {point.y:.4g})"


def _link(
    point: CurvePoint,
    curve: Curve,
    place: tuple[float, float],
    targets: Mapping[str, str],
    on_front: bool,
) -> Markup:
    return Markup(
        '<a href="{}" class="kind-{}" tabindex="{}" aria-label="{}"><path class="mark{}" '
        'transform="translate({} {})" d="{}"/></a>'
    ).format(
        targets[point.name],
        point.kind,
        0 if on_front else -1,
        _point_text(point, curve) + (", on the front" if on_front else ""),
        " front" if on_front else "",
        _n(place[0]),
        _n(place[1]),
        MARKERS[point.kind],
    )


def _labels(
    curve: Curve,
    front: Sequence[CurvePoint],
    places: Mapping[str, tuple[float, float]],
    area: Box,
    steps: Sequence[tuple[float, float]],
) -> Markup:
    size = _SIZE - 1
    labelled = [*front, *(p for p in curve.points if p.kind == "base" and p not in front)]
    placed = place_labels(
        [
            Label(*places[p.name], [text_width(text, size) for text in (p.label, p.code)], size * 1.1)
            for p in labelled
        ],
        [*(Box(x - 6, y - 6, x + 6, y + 6) for x, y in places.values()), *step_boxes(steps)],
        area,
        9.0,
    )
    return _join(
        Markup('<text class="label" x="{}" y="{}" text-anchor="{}" aria-hidden="true">{}</text>').format(
            _n(found.x),
            _n(found.box.bottom - 2.5),
            found.anchor,
            (point.label, point.code)[found.choice],
        )
        for point, found in zip(labelled, placed, strict=True)
        if found is not None
    )


def _levels(change: Mapping[int, float]) -> dict[int, int]:
    logs = {block: math.log(max(value, 1e-12)) for block, value in change.items()}
    low, high = min(logs.values(), default=0.0), max(logs.values(), default=0.0)
    last = len(COLOURS) - 1
    return {
        block: round((value - low) / (high - low) * last) if high > low else last // 2
        for block, value in logs.items()
    }


def _extremes(row: StripRow) -> str:
    if not row.change:
        return "none"
    least, most = min(row.change, key=row.change.__getitem__), max(row.change, key=row.change.__getitem__)
    said = [f"{how} in block {b} ({row.values[b]:.3g})" for how, b in (("least", least), ("most", most))]
    return f"changes {' and '.join(said)}"


def _empty_cell(left: float, top: float, width: float, height: float, title: str) -> Markup:
    return Markup('<rect class="empty" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
        _n(left), _n(top), _n(width), _n(height), title
    )


def _index(value: float | None) -> int:
    if value is None:
        return _GONE
    return _FIRST + bisect.bisect_right(_BOUNDS, value) if value > 0 else _NEVER


def _image(
    cells: Sequence[Sequence[int]], palette: Sequence[tuple[int, int, int, int]], where: Markup
) -> Markup:
    return Markup('<image href="{}"{} preserveAspectRatio="none"/>').format(
        data_uri(indexed_png(cells, palette)), where
    )


def _overlay(key: str, cells: Sequence[Sequence[int]], index: int, pattern: str, where: Markup) -> Markup:
    marked = [[int(cell == index) for cell in row] for row in cells]
    if not any(map(any, marked)):
        return Markup()
    return Markup('<mask id="{0}">{1}</mask><rect fill="url(#{2})" mask="url(#{0})"{3}/>').format(
        key, _image(marked, _MASK, where), pattern, where
    )


def _whole_ticks(count: int) -> list[float]:
    if count <= 12:
        return [float(number) for number in range(count)]
    return [tick for tick in round_ticks(0, count - 1, 8) if tick == int(tick)]


def _join(parts: Iterable[Markup]) -> Markup:
    return Markup().join(parts)


def _n(value: float) -> str:
    """A coordinate: a tenth of a unit is less than anybody sees."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
