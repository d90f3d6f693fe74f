"""From scores to decisions: which blocks, MoE layers and experts go. Pure functions; no model is needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["ExpertRoom", "amount_of", "experts_to_drop", "parts_to_drop", "run_to_drop"]

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class ExpertRoom:
    """What one MoE layer allows.

    :param num_experts: experts it has now
    :param floor: fewest experts it may be left with
    :param num_groups: groups of a group-limited router; every group must lose the same number of experts
    """

    num_experts: int
    floor: int
    num_groups: int = 1


def amount_of(num_drop: int | None, drop_ratio: float | None, total: int, what: str) -> int:
    """Number of parts to drop.

    :param total: how many such parts there are
    :param what: what they are called in messages
    :raises ValueError: the ratio comes to nothing, or nothing would be left
    """
    if num_drop is None:
        num_drop = int(total * drop_ratio + 1e-9)
        if num_drop < 1:
            raise ValueError(
                f"drop_ratio={drop_ratio} of {total} {what} drops none; use at least {1 / total:.3g}."
            )
    if num_drop >= total:
        raise ValueError(f"num_drop={num_drop} would drop all {total} {what}; at least one must stay.")
    return num_drop


def parts_to_drop(
    scores: Mapping[int, float],
    *,
    count: int | None = None,
    threshold: float | None = None,
    drop_highest: bool = True,
    protect: Collection[int] = (),
) -> list[int]:
    """Choose blocks or MoE layers: the ``count`` most expendable, or all beyond ``threshold``.

    :param scores: part index -> score
    :param drop_highest: whether high scores mark expendable parts
    :param protect: indices that stay
    :return: sorted indices; equal scores go by index, so the same scores give the same plan
    :raises ValueError: fewer unprotected parts than ``count``, or the threshold would take every part
    """
    sign = -1.0 if drop_highest else 1.0
    order = sorted(
        (index for index in scores if index not in protect), key=lambda index: (sign * scores[index], index)
    )
    if threshold is not None:
        chosen = [index for index in order if sign * scores[index] < sign * threshold]
        if len(chosen) == len(scores):
            raise ValueError(
                f"threshold={threshold} would drop all {len(scores)} parts; at least one must stay."
            )
        return sorted(chosen)
    if count is None or len(order) < count:
        raise ValueError(
            f"{count} parts are to be dropped, but only {len(order)} are not protected: lower the amount."
        )
    return sorted(order[:count])


def run_to_drop(
    run_scores: Mapping[int, float],
    blocks: Sequence[int],
    length: int,
    *,
    drop_highest: bool,
    protect: Collection[int],
) -> list[int]:
    """Choose the best run of ``length`` neighbouring blocks.

    :param run_scores: first block of a run -> score of the run
    :param blocks: blocks that are there, in order
    :raises ValueError: every run of that length holds a protected block
    """
    positions = {index: position for position, index in enumerate(blocks)}
    runs = {
        first: blocks[positions[first] : positions[first] + length]
        for first in run_scores
        if not set(blocks[positions[first] : positions[first] + length]) & set(protect)
    }
    if not runs:
        raise ValueError(
            f"No run of {length} neighbouring blocks is free of the protected ones {sorted(protect)}."
        )
    sign = -1.0 if drop_highest else 1.0
    best = min(runs, key=lambda first: (sign * run_scores[first], first))
    return list(runs[best])


def longest_run_beyond(
    scores: Mapping[int, float],
    blocks: Sequence[int],
    threshold: float,
    *,
    drop_highest: bool,
    protect: Collection[int],
) -> list[int]:
    """The longest run of neighbouring blocks that are all beyond ``threshold``; of equally long ones the
    first.
    """
    beyond = set(parts_to_drop(scores, threshold=threshold, drop_highest=drop_highest, protect=protect))
    best: list[int] = []
    run: list[int] = []
    for index in blocks:
        run = [*run, index] if index in beyond else []
        if len(run) > len(best):
            best = run
    return best


def experts_to_drop(
    scores: Mapping[int, Sequence[float | None]],
    rooms: Mapping[int, ExpertRoom],
    per_layer: int,
    scope: Scope,
    total: int | None = None,
) -> dict[int, list[int]]:
    """Choose experts, lowest scores first; an expert without a score (it saw no token) goes before all
    others.

    Layer scope takes ``per_layer`` from every layer. Global scope pools all layers, unnormalised, and takes
    as many in all (arXiv 2406.02500, Expert Drop), never leaving a layer with fewer experts than its floor. A
    group-limited router loses the same number in each of its groups, so there experts go in rounds: each
    round takes every group's lowest.

    :param scores: layer -> score per expert
    :param rooms: layer -> what it allows
    :param per_layer: experts to drop per layer (their mean, in global scope)
    :param total: in global scope, the number to drop in all when it is not ``per_layer`` times the layers
    :return: layer -> sorted indices of dropped experts; layers that lose none are left out
    :raises ValueError: a floor or a group stands in the way; names the layer and what would work
    """
    rounds = {layer: _rounds(scores[layer], rooms[layer].num_groups) for layer in scores}
    if scope == "layer":
        return {layer: _take(rounds[layer], layer, rooms[layer], per_layer) for layer in scores if per_layer}
    wanted = per_layer * len(scores) if total is None else total
    queue = sorted(
        (cost, layer, position) for layer, list_ in rounds.items() for position, (cost, _) in enumerate(list_)
    )
    taken = dict.fromkeys(scores, 0)
    dropped = 0
    for _, layer, _position in queue:
        size = rooms[layer].num_groups
        left = rooms[layer].num_experts - (taken[layer] + 1) * size
        if left >= rooms[layer].floor and dropped + size <= wanted:
            taken[layer] += 1
            dropped += size
    if dropped < wanted:
        room = sum((r.num_experts - r.floor) // r.num_groups * r.num_groups for r in rooms.values())
        if room >= wanted:
            groups = max(r.num_groups for r in rooms.values())
            raise ValueError(
                f"{wanted} experts are to be dropped in all, but the routers limit the choice to {groups} "
                f"groups, and every group "
                f"must lose the same number: use a multiple of {groups}."
            )
        raise ValueError(
            f"{wanted} experts are to be dropped in all, but the floors allow {room}: lower the amount or "
            f"min_experts."
        )
    return {
        layer: sorted(expert for _, experts in rounds[layer][:count] for expert in experts)
        for layer, count in taken.items()
        if count
    }


def _rounds(scores: Sequence[float | None], num_groups: int) -> list[tuple[float, list[int]]]:
    """Order in which a layer's experts go: (mean score, experts) per round, one expert per group in each."""
    size = len(scores) // num_groups

    def key(expert: int) -> tuple[float, int]:
        score = scores[expert]
        return (float("-inf") if score is None else score, expert)

    orders = [sorted(range(group * size, (group + 1) * size), key=key) for group in range(num_groups)]
    return [
        (sum(key(order[position])[0] for order in orders) / num_groups, [order[position] for order in orders])
        for position in range(size)
    ]


def _take(rounds: list[tuple[float, list[int]]], layer: int, room: ExpertRoom, count: int) -> list[int]:
    if count % room.num_groups:
        raise ValueError(
            f"num_drop={count} in layer {layer}: its router limits the choice to {room.num_groups} groups, "
            f"and every group must lose "
            f"the same number of experts. Use a multiple of {room.num_groups}."
        )
    if room.num_experts - count < room.floor:
        raise ValueError(
            f"num_drop={count} would leave layer {layer} with {room.num_experts - count} of "
            f"{room.num_experts} experts; "
            f"it needs at least {room.floor}. Drop at most {room.num_experts - room.floor}."
        )
    return sorted(expert for _, experts in rounds[: count // room.num_groups] for expert in experts)
