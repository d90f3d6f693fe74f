"""How far a router's decisions moved: pure functions on two traces of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmcompressor_moe.profile.forward import sum_over_ranks
from llmcompressor_moe.profile.routing import RouterTrace
from llmcompressor_moe.quantization.report import RoutingFidelity

__all__ = ["load_cv", "restricted", "routing_fidelity"]


def restricted(trace: RouterTrace, experts: Sequence[int]) -> RouterTrace:
    """A trace without the experts that are gone; probabilities are renormalised over those that are left.

    :param experts: columns to keep, in order
    """
    columns = list(experts)
    probabilities = trace.probabilities
    if probabilities is not None:
        probabilities = probabilities[:, columns]
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return RouterTrace(trace.chosen[:, columns], probabilities)


def load_cv(load: torch.Tensor) -> float:
    """Coefficient of variation of the experts' load, [experts] choices: standard deviation over mean."""
    mean = float(load.mean())
    return float(load.std(correction=0)) / mean if mean else 0.0


def routing_fidelity(before: RouterTrace, after: RouterTrace) -> RoutingFidelity:
    """Compare two traces of the same tokens and experts, summed over all ranks.

    The overlap of a token is the share of its experts before that are chosen after; a token whose experts are
    all gone counts as no overlap.
    """
    kept = (before.chosen & after.chosen).sum(dim=-1).double()
    wanted = before.chosen.sum(dim=-1).double()
    overlap = (kept / wanted.clamp(min=1)).sum()
    divergence = torch.zeros((), dtype=torch.float64)
    both = before.probabilities is not None and after.probabilities is not None
    if both:
        p, q = (trace.probabilities.double().clamp(min=1e-12) for trace in (before, after))
        divergence = (p * (p / q).log()).sum()
    loads = torch.stack([trace.chosen.sum(dim=0).double() for trace in (before, after)])
    totals = sum_over_ranks(torch.stack([overlap, divergence, torch.tensor(float(len(kept))).double()]))
    loads = sum_over_ranks(loads)
    tokens = max(float(totals[2]), 1.0)
    shares = loads / loads.sum(dim=-1, keepdim=True).clamp(min=1)
    return RoutingFidelity(
        top_k_overlap=float(totals[0]) / tokens,
        router_kl=max(float(totals[1]) / tokens, 0.0) if both else None,
        load_change=float((shares[1] - shares[0]).abs().sum() / 2),
        load_cv_before=load_cv(loads[0]),
        load_cv_after=load_cv(loads[1]),
        dead_before=int((loads[0] == 0).sum()),
        dead_after=int((loads[1] == 0).sum()),
    )
