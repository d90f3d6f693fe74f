"""How much each expert matters, from the statistics of one pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from llmcompressor_moe.profile import Profile, Statistic
from llmcompressor_moe.profile.data import ExpertProfile

__all__ = ["IMPORTANCE", "STATISTICS", "importance_of", "random_importance"]

# A layer that leaves the residual stream as it is still counts for something.
_LEAST_CHANGE = 1e-6


def utilization(layer: ExpertProfile) -> list[float]:
    """Tokens routed to each expert."""
    return [float(count) for count in layer.routed_tokens]


def sensitivity(layer: ExpertProfile) -> list[float]:
    """Mean over an expert's routed tokens of router weight times norm of its output (arXiv 2510.13999); 0
    without tokens.
    """
    sums = layer.weighted_output_norm or []
    return [total / count if count else 0.0 for total, count in zip(sums, layer.routed_tokens, strict=True)]


IMPORTANCE: dict[str, Callable[[ExpertProfile], list[float]]] = {
    "utilization": utilization,
    "sensitivity": sensitivity,
}

# What has to be profiled for each.
STATISTICS: dict[str, frozenset[Statistic]] = {
    "utilization": frozenset({Statistic.ROUTING, Statistic.LAYER, Statistic.BLOCK}),
    "sensitivity": frozenset({Statistic.OUTPUT, Statistic.LAYER, Statistic.BLOCK}),
}


def importance_of(name: str, profile: Profile) -> dict[int, list[float]]:
    """Importance of every expert, comparable over all layers: its share of its layer, times how much the layer
    changes the residual stream.

    Norms cannot be compared between layers, because the residual stream grows with depth. What a layer's
    output does to it can: 1 minus the cosine of the stream before and after the layer.

    :param name: a key of `IMPORTANCE`
    :return: block index -> one number per expert, not negative, in the order of the profile
    """
    change = _change(profile)
    result = {}
    for index, layer in profile.experts.items():
        values = IMPORTANCE[name](layer)
        total = sum(values) or 1.0
        result[index] = [change[index] * value / total for value in values]
    return result


def random_importance(counts: Mapping[int, int], seed: int) -> dict[int, list[float]]:
    """Baseline: uniform at random.

    :param counts: block index -> experts
    """
    return {
        index: [generator.random() for _ in range(count)]
        for index, count in counts.items()
        for generator in [random.Random(seed * 1_000_003 + index)]
    }


def _change(profile: Profile) -> dict[int, float]:
    """Per MoE layer 1 - cosine; over the block, in all layers, where a family has no separate MoE layer."""
    whole = set(profile.experts) <= set(profile.layer_similarity)
    similarity = profile.layer_similarity if whole else profile.block_similarity
    return {index: max(_LEAST_CHANGE, 1.0 - similarity[index]) for index in profile.experts}
