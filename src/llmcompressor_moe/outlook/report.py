"""A forecast over ranges of drops and bits, and how far is safe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from pydantic import BaseModel, ConfigDict

from llmcompressor_moe.evidence import Evidence
from llmcompressor_moe.evidence.gather import ModelShape
from llmcompressor_moe.outlook.calibration import Calibration, bundled_calibration
from llmcompressor_moe.outlook.coverage import Coverage, coverage
from llmcompressor_moe.outlook.damage import Damage, first_order_damage
from llmcompressor_moe.outlook.predict import LossForecast, predict_loss
from llmcompressor_moe.quantization.planning import mean_bits
from llmcompressor_moe.sweep.choice import Drops, choose
from llmcompressor_moe.sweep.grid import Grid, Point, Row

__all__ = ["Outlook", "PointForecast", "SafeUpTo", "check_allowed", "common_ranges", "outlook", "safe_up_to"]


class PointForecast(BaseModel):
    """What one variant of the model is expected to lose.

    :param dropped: what would go, by the base's indices
    :param schemes: block index -> scheme of its experts; empty where they stay as they are
    """

    model_config = ConfigDict(extra="forbid")

    point: Point
    dropped: Drops
    schemes: dict[int, str]
    damage: Damage
    loss: LossForecast


class SafeUpTo(BaseModel):
    """How far each kind goes alone before the upper end of a forecast leaves the allowed increase.

    :param blocks: most blocks
    :param layers: most MoE layers
    :param experts: most experts per MoE layer
    :param bits: fewest mean bits per expert weight; None: none of those tried
    """

    model_config = ConfigDict(extra="forbid")

    blocks: int = 0
    layers: int = 0
    experts: int = 0
    bits: float | None = None


class Outlook(BaseModel):
    """A forecast.

    :param allowed_increase: of the perplexity, relative
    :param points: in the grid's order
    :param calibration: the curve behind the forecast, with the models that it was fitted on
    """

    model_config = ConfigDict(extra="forbid")

    allowed_increase: float
    safe: SafeUpTo
    points: list[PointForecast]
    coverage: Coverage
    calibration: Calibration


def common_ranges(shape: ModelShape) -> list[Row]:
    """One kind at a time: up to half of the blocks and of the MoE layers, experts down to what routers need, and
    each scheme's own bits and half-way to the next one's.
    """
    layers = len(shape.rooms)
    group = math.lcm(*(room.num_groups for room in shape.rooms.values()))
    experts = min(room.num_experts - room.floor for room in shape.rooms.values())
    ranges = {
        "blocks": list(range(1, min(shape.blocks // 2, layers - 1) + 1)),
        "layers": list(range(1, layers // 2 + 1)),
        "experts": list(range(group, experts + 1, group)),
        "bits": _bits(shape),
    }
    return [Row(**{kind: values}) for kind, values in ranges.items() if values]


def outlook(
    evidence: Evidence,
    shape: ModelShape,
    grid: Grid,
    allowed_increase: float = 0.05,
    calibration: Calibration | None = None,
) -> Outlook:
    """Forecast every point of a grid but the untouched model.

    :param shape: of the model that the evidence is of, with the grid's schemes
    :param allowed_increase: of the perplexity, relative: 0.05 for five percent
    :param calibration: defaults to the bundled one
    :raises ValueError: ``allowed_increase`` is negative or no number, or a point is impossible; names it
    """
    check_allowed(allowed_increase)
    calibration = calibration or bundled_calibration()
    points = []
    for point in grid.all_points():
        if point == Point():
            continue
        choice = choose(evidence, grid, point, shape)
        damage = first_order_damage(evidence, choice.dropped, choice.schemes)
        points.append(
            PointForecast(
                point=point,
                dropped=choice.dropped,
                schemes=choice.schemes,
                damage=damage,
                loss=predict_loss(damage, calibration),
            )
        )
    return Outlook(
        allowed_increase=allowed_increase,
        safe=safe_up_to(points, allowed_increase),
        points=points,
        coverage=coverage(evidence, _deciding(grid)),
        calibration=calibration,
    )


def check_allowed(increase: float) -> None:
    """Refuse an increase that is none.

    :raises ValueError: see `outlook`
    """
    if not 0 <= increase < math.inf:
        raise ValueError(f"allowed_increase={increase}: give 0 or more, 0.05 for five percent.")


def safe_up_to(points: Sequence[PointForecast], allowed_increase: float) -> SafeUpTo:
    """Go from the mildest point of each kind to the harshest and stop before the first one whose upper end leaves
    the allowed increase. Points of several kinds are passed over.
    """
    safe: dict[str, float] = {}
    for kind, mildest_first in (("blocks", 1), ("layers", 1), ("experts", 1), ("bits", -1)):
        alone = {
            getattr(one.point, kind): one.loss
            for one in points
            if getattr(one.point, kind) and one.point == Point(**{kind: getattr(one.point, kind)})
        }
        for amount in sorted(alone, key=lambda value, sign=mildest_first: sign * value):
            if not alone[amount].keeps(allowed_increase):
                break
            safe[kind] = amount
    return SafeUpTo(**safe)


def _bits(shape: ModelShape) -> list[float]:
    """From the smallest scheme to the largest but one, rounded up so that budgets suffice."""
    names = next(iter(shape.sizes.values()))[0]
    own = sorted(
        mean_bits(shape.sizes, {layer: [name] * len(experts) for layer, experts in shape.sizes.items()})
        for name in names
    )
    between = [(low + high) / 2 for low, high in pairwise(own)]
    return sorted({math.ceil(round(bits * 100, 6)) / 100 for bits in [*own[:-1], *between]})


def _deciding(grid: Grid) -> tuple[str, ...]:
    """Statistics whose stability matters for what the grid drops."""
    parts = {"block similarity": grid.block_metric, "layer similarity": grid.layer_metric}
    return (grid.criterion, *(name for name, metric in parts.items() if metric == "cosine"))
