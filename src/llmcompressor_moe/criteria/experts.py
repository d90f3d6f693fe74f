"""Criteria for experts: how much an expert contributes. The lowest scores go first."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from llmcompressor_moe.profile.data import ExpertProfile, Statistic

__all__ = ["EXPERT_CRITERIA", "ExpertCriterion", "ScoreInput", "expert_criterion"]


@dataclass(frozen=True)
class ScoreInput:
    """What a criterion may look at, for one MoE layer.

    :param profile: statistics; None for criteria that need no data
    :param num_samples: calibration sequences behind the statistics
    :param num_experts: experts that the layer has
    :param weights: each expert's weight matrices, read one expert at a time, and only as far as they are looked at
    :param layer: original block index
    :param seed: seed of the modifier
    """

    profile: ExpertProfile | None
    num_samples: int
    num_experts: int
    weights: Iterable[Sequence[torch.Tensor]]
    layer: int
    seed: int


Scores = list[float | None]


@dataclass(frozen=True)
class ExpertCriterion:
    """A score per expert and what it needs.

    :param source: where the criterion comes from
    :param score: one number per expert, None for an expert without any evidence (it saw no token)
    :param statistics: what has to be profiled
    """

    source: str
    score: Callable[[ScoreInput], Scores]
    statistics: frozenset[Statistic] = frozenset()


def router_score(given: ScoreInput) -> Scores:
    """Sum over tokens of an expert's routing probability, divided by the sample count (arXiv 2406.02500,
    Expert Drop).

    Softmax routers (Mixtral, Qwen2-MoE): the softmax over all experts. Others, and those that choose among groups
    (DeepSeek): the top-k-masked gate weights.
    """
    profile = _profile(given)
    total = profile.routing_probability or profile.gate_weight
    return [value / given.num_samples for value in total]


def frequency(given: ScoreInput) -> Scores:
    """Share of the layer's routed choices that went to the expert."""
    tokens = _profile(given).routed_tokens
    total = max(1, sum(tokens))
    return [count / total for count in tokens]


def reap(given: ScoreInput) -> Scores:
    """Mean over the expert's routed tokens of router weight times L2 norm of its output (arXiv 2510.13999,
    REAP).
    """
    profile = _profile(given)
    return _mean_over_tokens(profile.weighted_output_norm, profile.routed_tokens)


def output_norm(given: ScoreInput) -> Scores:
    """Mean over the expert's routed tokens of the L2 norm of its output."""
    profile = _profile(given)
    return _mean_over_tokens(profile.output_norm, profile.routed_tokens)


def weight_norm(given: ScoreInput) -> Scores:
    """Frobenius norm of all weights of the expert; needs no data.

    :raises FloatingPointError: weights are NaN or infinite
    """
    norms = [
        float(torch.stack([matrix.double().square().sum() for matrix in expert]).sum().sqrt())
        for expert in given.weights
    ]
    bad = [expert for expert, norm in enumerate(norms) if not math.isfinite(norm)]
    if bad:
        raise FloatingPointError(
            f"The weights of experts {bad} in block {given.layer}: they are NaN or infinite. No part was dropped. "
            "Check the checkpoint."
        )
    return norms


def redundancy(given: ScoreInput) -> Scores:
    """How long an expert stays when the one most similar to another kept expert is dropped again and again.

    Similarity is the mean cosine of two experts' outputs on the same tokens. Of the most similar pair the one
    that is on average more similar to the rest goes. The score of an expert is 1 minus its largest similarity
    at the moment it would go, made non-decreasing, so that any number of lowest scores is what the greedy
    order drops.
    """
    similarity = torch.tensor(_profile(given).output_similarity, dtype=torch.float64)
    similarity.fill_diagonal_(-1.0)
    count = len(similarity)
    kept = list(range(count))
    scores: Scores = [None] * count
    floor = 0.0
    while len(kept) > 1:
        among = similarity[kept][:, kept]
        pair = divmod(int(among.argmax()), len(kept))
        position = max(pair, key=lambda p: (float(among[p].sum()), -p))
        floor = max(floor, 1.0 - float(among.max()))
        scores[kept[position]] = floor
        # Ties keep the order of the drops.
        floor = float(
            torch.nextafter(torch.tensor(floor, dtype=torch.float64), torch.tensor(9.0, dtype=torch.float64))
        )
        del kept[position]
    scores[kept[0]] = max(floor, 1.0)
    return scores


def random_score(given: ScoreInput) -> Scores:
    """Baseline: uniform at random from the seed and the layer."""
    generator = random.Random(given.seed * 1_000_003 + given.layer)
    return [generator.random() for _ in range(given.num_experts)]


def _profile(given: ScoreInput) -> ExpertProfile:
    if given.profile is None:
        raise ValueError(f"Layer {given.layer} has no statistics; this criterion needs calibration data.")
    return given.profile


def _mean_over_tokens(sums: list[float] | None, tokens: list[int]) -> Scores:
    return [total / count if count else None for total, count in zip(sums or [], tokens, strict=True)]


_ROUTING = frozenset({Statistic.ROUTING})
_OUTPUT = frozenset({Statistic.OUTPUT})

EXPERT_CRITERIA: dict[str, ExpertCriterion] = {
    "router_score": ExpertCriterion("arXiv 2406.02500, Expert Drop", router_score, _ROUTING),
    "frequency": ExpertCriterion("share of routed choices", frequency, _ROUTING),
    "reap": ExpertCriterion("arXiv 2510.13999", reap, _OUTPUT),
    "output_norm": ExpertCriterion("mean output norm on routed tokens", output_norm, _OUTPUT),
    "weight_norm": ExpertCriterion("Frobenius norm of the weights", weight_norm),
    "redundancy": ExpertCriterion(
        "greedy on output similarity", redundancy, frozenset({Statistic.ROUTING, Statistic.REDUNDANCY})
    ),
    "random": ExpertCriterion("baseline: uniform at random", random_score),
}


def expert_criterion(name: str) -> ExpertCriterion:
    """Look a criterion up.

    :raises ValueError: unknown name
    """
    if name not in EXPERT_CRITERIA:
        raise ValueError(
            f"criterion={name!r} is unknown; choose one of {', '.join(sorted(EXPERT_CRITERIA))}."
        )
    return EXPERT_CRITERIA[name]
