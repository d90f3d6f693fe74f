"""Whether calibration data shows enough of a model to be believed. Pure arithmetic on evidence."""

from __future__ import annotations

import statistics
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmcompressor_moe.evidence import Evidence
from llmcompressor_moe.quantization.sensitivity import PRIOR_TOKENS

__all__ = [
    "FEW_KL_TOKENS",
    "SHAKY_STABILITY",
    "STARVED_POOR",
    "UNSEEN_POOR",
    "WEAK_STABILITY",
    "Coverage",
    "coverage",
]

# Shares of experts, rank correlations and tokens from which the verdict changes.
UNSEEN_POOR = 0.01
STARVED_POOR = 0.05
WEAK_STABILITY = 0.5
SHAKY_STABILITY = 0.8
FEW_KL_TOKENS = 1024

Verdict = Literal["good", "thin", "poor"]


class Coverage(BaseModel):
    """What calibration data shows of the experts.

    :param experts: in all MoE layers together
    :param min_tokens: tokens routed to the expert that saw fewest
    :param unseen: experts that saw none
    :param starved: experts that saw fewer than `quantization.sensitivity.PRIOR_TOKENS` tokens, unseen ones too
    :param stability: statistic -> Spearman's rank correlation of its scores between halves of the data; null
        where there is too little to rank
    :param kl_tokens: tokens behind the divergences without blocks and layers, about
    :param verdict: ``poor``: do not trust the forecast; ``thin``: give more data before it decides something
    :param reasons: what is behind a verdict that is not good, with what would help
    """

    model_config = ConfigDict(extra="forbid")

    experts: int
    tokens: int
    min_tokens: int
    median_tokens: float
    unseen: int
    starved: int
    stability: dict[str, float | None]
    kl_tokens: int
    verdict: Verdict
    reasons: list[str]

    @property
    def starved_share(self) -> float:
        """Share of experts that saw too few tokens for their own numbers to be trusted."""
        return self.starved / self.experts


def coverage(evidence: Evidence, used: tuple[str, ...] = ("reap",)) -> Coverage:
    """Judge calibration data.

    ``poor``: more than `UNSEEN_POOR` of the experts saw no token, more than `STARVED_POOR` fewer than
    `PRIOR_TOKENS`, or scores that decide are ranked by the halves of the data with a correlation below
    `WEAK_STABILITY`. ``thin``: any unseen or starved expert, a correlation below `SHAKY_STABILITY`, or divergences
    from fewer than `FEW_KL_TOKENS` tokens. ``good``: none of these.

    :param used: statistics of ``evidence.stability`` that decide what goes
    :raises ValueError: there is no expert to judge
    """
    counts = [count for layer in evidence.layers.values() for count in layer.routed_tokens]
    if not counts:
        raise ValueError("evidence: layers holds no expert; gather it from a Mixture-of-Experts model.")
    unseen = sum(count == 0 for count in counts)
    starved = sum(count < PRIOR_TOKENS for count in counts)
    kl_tokens = round(evidence.tokens * evidence.kl_samples / max(evidence.samples, 1))
    poor, thin = [], []
    if unseen:
        (poor if unseen > UNSEEN_POOR * len(counts) else thin).append(
            f"{unseen} of {len(counts)} experts saw no token: more samples, or text like what will be served"
        )
    if starved > unseen:
        (poor if starved > STARVED_POOR * len(counts) else thin).append(
            f"{starved} of {len(counts)} experts saw fewer than {PRIOR_TOKENS} tokens: more samples"
        )
    for name in used:
        value = evidence.stability.get(name)
        if value is not None and value < SHAKY_STABILITY:
            (poor if value < WEAK_STABILITY else thin).append(
                f"halves of the data rank by {name} with a correlation of {value:.2f} only: more samples"
            )
    if kl_tokens < FEW_KL_TOKENS:
        thin.append(f"divergences come from about {kl_tokens} tokens: more kl_samples")
    return Coverage(
        experts=len(counts),
        tokens=evidence.tokens,
        min_tokens=min(counts),
        median_tokens=statistics.median(counts),
        unseen=unseen,
        starved=starved,
        stability=evidence.stability,
        kl_tokens=kl_tokens,
        verdict="poor" if poor else "thin" if thin else "good",
        reasons=poor + thin,
    )
