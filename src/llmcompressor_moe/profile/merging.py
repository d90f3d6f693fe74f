"""Put profiles of parts of the data together."""

from __future__ import annotations

from collections.abc import Mapping

from llmcompressor_moe.profile.data import ExpertProfile, Profile

__all__ = ["merged"]

_SUMS = ("gate_weight", "routing_probability", "output_norm", "weighted_output_norm")


def merged(first: Profile, second: Profile) -> Profile:
    """The profile of all data from those of two parts of it: sums are added, means weighted by tokens.

    :raises ValueError: one of them holds similarities of expert outputs, which cannot be added up, or they are of
        different models
    """
    if first.experts.keys() != second.experts.keys() or first.run_length != second.run_length:
        raise ValueError("the profiles are of different models or statistics")

    def mean(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
        total = first.num_tokens + second.num_tokens
        return {index: (a[index] * first.num_tokens + b[index] * second.num_tokens) / total for index in a}

    return Profile(
        num_tokens=first.num_tokens + second.num_tokens,
        num_samples=first.num_samples + second.num_samples,
        block_similarity=mean(first.block_similarity, second.block_similarity),
        layer_similarity=mean(first.layer_similarity, second.layer_similarity),
        run_similarity=mean(first.run_similarity, second.run_similarity),
        run_length=first.run_length,
        experts={index: _experts(first.experts[index], second.experts[index]) for index in first.experts},
    )


def _experts(first: ExpertProfile, second: ExpertProfile) -> ExpertProfile:
    if first.output_similarity is not None or second.output_similarity is not None:
        raise ValueError("similarities of expert outputs cannot be added up; profile all data at once")
    sums = {
        name: _added(ours, theirs)
        for name in _SUMS
        if (ours := getattr(first, name)) is not None and (theirs := getattr(second, name)) is not None
    }
    return ExpertProfile(routed_tokens=_added(first.routed_tokens, second.routed_tokens), **sums)


def _added(first: list, second: list) -> list:
    return [a + b for a, b in zip(first, second, strict=True)]
