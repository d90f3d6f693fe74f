"""How much each layer loses, by what the model's output loses with it: ``scope="sensitivity"``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmcompressor_moe.counts import choose_counts, counts_to_measure, damage_curve
from llmcompressor_moe.plan import ExpertRoom, experts_to_drop
from llmcompressor_moe.profile.changes import Change, WithoutExperts
from llmcompressor_moe.profile.forward import sum_over_ranks, tokens_of
from llmcompressor_moe.profile.splitting import some_samples
from llmcompressor_moe.profile.variants import Variant, divergence_of, passes_of
from llmcompressor_moe.report import DropCurves
from llmcompressor_moe.surgery.experts import RoutingParts, routing_parts
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["MOST_PASSES", "MOST_TOKENS", "Wanted", "choose_amounts", "choose_by_damage", "measured_share"]

# Bare passes over the calibration data that the curves of all layers may take.
MOST_PASSES = 8
# A mean over so many tokens tells layers apart; hidden states of all variants wait at the end of a pass.
MOST_TOKENS = 16384

Scores = Mapping[int, Sequence[float | None]]


@dataclass(frozen=True)
class Wanted:
    """How much is to go. Keys are layers.

    :param rooms: what each layer allows
    :param allowed: counts that each layer may lose
    :param amounts: what each would lose, were all cut alike
    :param total: of all layers
    """

    rooms: Mapping[int, ExpertRoom]
    allowed: Mapping[int, Sequence[int]]
    amounts: Mapping[int, int]
    total: int

    def measured(self) -> dict[int, list[int]]:
        """Counts at which each layer is cut to measure."""
        return counts_to_measure(self.allowed, self.amounts, self.total)


def measured_share(blocks: Sequence[int], num_blocks: int, tokens: int) -> float:
    """Share of the calibration data that all variants can see within `MOST_PASSES` and `MOST_TOKENS`.

    :param blocks: index of the block that each variant changes
    :param tokens: of the calibration data
    """
    return min(1.0, MOST_PASSES / passes_of(blocks, num_blocks), MOST_TOKENS / max(tokens, 1))


def choose_by_damage(
    session: TrimSession, batches: Iterable[dict[str, Any]], scores: Scores, wanted: Wanted
) -> tuple[dict[int, list[int]], DropCurves]:
    """Experts to drop, so that the sum over layers of the damage that each does alone is least.

    :param scores: layer -> score per expert it has now; the lowest go first
    :return: layer -> positions among its experts, layers that lose none left out; and what was measured
    :raises FloatingPointError: the model's output is NaN or infinite
    """
    order = _Order(scores, wanted.rooms)

    @functools.cache
    def parts(layer: int) -> RoutingParts:
        return routing_parts(session.model, session.layer(layer))

    def cut(layer: int, count: int) -> Change:
        return WithoutExperts(parts(layer), order.kept(layer, count))

    chosen, curves = choose_amounts(session, batches, wanted.allowed, wanted.measured(), wanted.total, cut)
    return {layer: order.dropped(layer, count) for layer, count in chosen.items() if count}, curves


def choose_amounts(
    session: TrimSession,
    batches: Iterable[dict[str, Any]],
    allowed: Mapping[int, Sequence[int]],
    measured: Mapping[int, Sequence[int]],
    total: int,
    cut: Callable[[int, int], Change],
) -> tuple[dict[int, int], DropCurves]:
    """How much each layer loses, so that the sum over layers of the damage that each does alone is least.

    :param allowed: layer -> amounts that it may lose
    :param measured: layer -> amounts that it is cut by to measure, see `counts.counts_to_measure`
    :param total: of all layers
    :param cut: gives a layer cut by an amount
    :return: layer -> amount; and what was measured
    :raises FloatingPointError: the model's output is NaN or infinite
    """
    cuts = [(layer, count) for layer, counts in measured.items() for count in counts]
    variants = [Variant(layer, cut(layer, count)) for layer, count in cuts]
    every = list(batches)
    all_tokens = _sum(tokens_of(batch) for batch in every)
    blocks, num_blocks = [layer for layer, _ in cuts], len(session.topology.blocks)
    samples = some_samples(every, measured_share(blocks, num_blocks, all_tokens))
    share = sum(map(tokens_of, samples)) / max(sum(map(tokens_of, every)), 1)
    nats, tokens = divergence_of(session.model, samples, variants, share=share)
    found: dict[int, dict[int, float]] = {layer: {} for layer in allowed}
    for (layer, count), value in zip(cuts, nats, strict=True):
        found[layer][count] = value
    damages = {layer: damage_curve(found[layer], counts) for layer, counts in allowed.items()}
    chosen = choose_counts(damages, total)
    curves = DropCurves(
        nats={layer: [(0, 0.0), *sorted(points.items())] for layer, points in found.items()},
        predicted=sum(damages[layer][count] for layer, count in chosen.items()),
        samples=_sum([len(samples)]),
        tokens=tokens,
        passes=tokens / max(all_tokens, 1) * passes_of(blocks, num_blocks),
    )
    return chosen, curves


class _Order:
    """Which experts a layer loses for a count."""

    def __init__(self, scores: Scores, rooms: Mapping[int, ExpertRoom]) -> None:
        self._scores, self._rooms = scores, rooms

    def dropped(self, layer: int, count: int) -> list[int]:
        one = {layer: self._scores[layer]}, {layer: self._rooms[layer]}
        return experts_to_drop(*one, count, "layer")[layer]

    def kept(self, layer: int, count: int) -> list[int]:
        gone = set(self.dropped(layer, count))
        return [expert for expert in range(self._rooms[layer].num_experts) if expert not in gone]


def _sum(counts: Iterable[int]) -> int:
    """Over all ranks."""
    return int(sum_over_ranks(torch.tensor([sum(counts)], dtype=torch.float64)).item())
