"""From evidence and a point to what goes and what gets which scheme. No model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmcompressor_moe.criteria.parts import part_metric
from llmcompressor_moe.evidence import Evidence, LayerEvidence
from llmcompressor_moe.evidence.gather import ModelShape
from llmcompressor_moe.plan import ExpertRoom, experts_to_drop, parts_to_drop
from llmcompressor_moe.quantization.planning import Budget, choose_schemes
from llmcompressor_moe.quantization.sizes import StoredSize
from llmcompressor_moe.sweep.grid import Grid, Point

__all__ = ["Choice", "Drops", "choose", "choose_drops", "choose_precision", "require_possible"]


@dataclass(frozen=True)
class Drops:
    """What goes, by the base's indices."""

    blocks: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    experts: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Everything that makes a variant.

    :param schemes: block index -> scheme of its experts; empty: all stay as they are
    """

    dropped: Drops
    schemes: dict[int, str]


def choose(evidence: Evidence, grid: Grid, point: Point, shape: ModelShape) -> Choice:
    """What goes at a point, and what gets which scheme.

    :raises ValueError: the point is impossible; names it
    """
    drops = choose_drops(evidence, grid, point, shape.rooms)
    if point.bits is None:
        return Choice(drops, {})
    kept = {
        layer: [e for e in range(room.num_experts) if e not in drops.experts.get(layer, ())]
        for layer, room in shape.rooms.items()
        if layer not in drops.blocks and layer not in drops.layers
    }
    sizes = {layer: [shape.sizes[layer][e] for e in experts] for layer, experts in kept.items()}
    try:
        return Choice(drops, choose_precision(evidence, sizes, kept, point.bits))
    except ValueError as error:
        raise ValueError(f"{point}: {error}") from error


def require_possible(grid: Grid, shape: ModelShape) -> None:
    """Find impossible points before anything is calibrated, by choosing where all parts are alike.

    Which blocks go decides which MoE layers are left. Here those without one go first, so what is refused is
    impossible whatever a calibration run finds.

    :raises ValueError: a point is impossible; names it
    """
    similarity = {block: float(block not in shape.rooms) for block in range(shape.blocks)}
    divergence = {block: 1 - value for block, value in similarity.items()}
    names = next(iter(shape.sizes.values()))[0]
    even = all(expert == names for experts in shape.sizes.values() for expert in experts)
    alike = Evidence(
        model_type=shape.model_type,
        blocks=shape.blocks,
        top_k=dict.fromkeys(shape.rooms, 1),
        tokens=0,
        samples=0,
        kl_samples=0,
        block_similarity=similarity,
        layer_similarity=similarity,
        block_divergence=divergence,
        layer_divergence=divergence,
        layers={
            layer: LayerEvidence(
                routed_tokens=[0] * room.num_experts,
                output_power=1,
                lost_power=[1] * room.num_experts,
                errors={name: [1] * room.num_experts for name in names},
                scores={grid.criterion: [1] * room.num_experts},
            )
            for layer, room in shape.rooms.items()
        },
        stability={},
    )
    for point in grid.all_points():
        # Where layers differ in their bits, it depends on those that are left whether a mean is possible.
        choose(alike, grid, point if even else point.model_copy(update={"bits": None}), shape)


def choose_drops(evidence: Evidence, grid: Grid, point: Point, rooms: Mapping[int, ExpertRoom]) -> Drops:
    """Blocks first, then MoE layers of those that are left, then experts of those that are left; all by what was
    seen of the intact model, as drop modifiers in a row do.

    :param rooms: MoE layer -> what it allows
    :raises ValueError: nothing would be left, or a layer's floor stands in the way; names the point
    """
    try:
        blocks = _parts(evidence.block_similarity, evidence.block_divergence, grid.block_metric, point.blocks)
        _leave_one(evidence.blocks - len(blocks), "block")
        left = [index for index in evidence.layers if index not in blocks]
        layers = _parts(
            {index: evidence.layer_similarity[index] for index in left},
            {index: evidence.layer_divergence[index] for index in left},
            grid.layer_metric,
            point.layers,
        )
        left = [index for index in left if index not in layers]
        _leave_one(len(left), "MoE layer")
        experts = {}
        if point.experts:
            scores = {index: _scores(evidence, index, grid.criterion) for index in left}
            experts = experts_to_drop(
                scores, {index: rooms[index] for index in left}, point.experts, grid.scope
            )
    except ValueError as error:
        raise ValueError(f"{point}: {error}") from error
    return Drops(blocks, layers, experts)


def choose_precision(
    evidence: Evidence,
    sizes: Mapping[int, Sequence[Mapping[str, StoredSize]]],
    kept: Mapping[int, Sequence[int]],
    bits: float,
) -> dict[int, str]:
    """A scheme per MoE layer with the smallest expected error.

    :param sizes: layer -> size of each expert that is left, under each candidate
    :param kept: layer -> experts that are left, by the base's indices
    :raises ValueError: fewer bits than the smallest candidate has
    """
    errors = {
        layer: {
            name: [values[expert] for expert in kept[layer]]
            for name, values in evidence.layers[layer].errors.items()
        }
        for layer in sizes
    }
    chosen = choose_schemes(sizes, errors, Budget(bits=bits), per_expert=False)
    return {layer: names[0] for layer, names in chosen.items()}


def _parts(
    similarity: Mapping[int, float], divergence: Mapping[int, float], metric: str, count: int
) -> list[int]:
    scores = similarity if metric == "cosine" else divergence
    return parts_to_drop(scores, count=count, drop_highest=part_metric(metric).drop_highest) if count else []


def _scores(evidence: Evidence, layer: int, criterion: str) -> list[float | None]:
    known = evidence.layers[layer].scores
    if criterion not in known:
        raise ValueError(f"the evidence has no scores by {criterion}; gather it again.")
    return known[criterion]


def _leave_one(left: int, what: str) -> None:
    if left < 1:
        raise ValueError(f"no {what} would be left; drop fewer.")
