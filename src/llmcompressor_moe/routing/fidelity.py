"""How far a router's decisions moved: pure functions on two traces of the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict

from llmcompressor_moe.profile.routing import RouterTrace

__all__ = ["RoutingFidelity", "load_cv", "restricted", "routing_fidelity"]

# Routers take the softmax in bfloat16 at the coarsest, which rounds a probability by less than this.
_ROUNDING = 2**-6


class RoutingFidelity(BaseModel):
    """One router before and after compression, on the same tokens.

    :param top_k_overlap: mean share of a token's experts that are chosen again; experts that are gone are not
    :param top_k_overlap_kept: the same against what the router before would choose without the experts that are
        gone (their probability masked); equal to ``top_k_overlap`` where none is gone, None where the choice
        does not follow from softmax probabilities alone
    :param replaced: share of tokens none of whose experts is chosen again
    :param router_kl: mean over tokens of KL(before || after) of the router's probabilities, in nats; the router
        before restricted to the experts that are left and renormalised. None where the router gives none
    :param load_change: half the sum over experts of the change in their share of all choices (0 to 1)
    :param load_cv_before: coefficient of variation of the experts' load
    :param load_cv_after: the same over the experts that are left
    :param dead_before: experts that no token chose
    :param dead_after: the same among the experts that are left
    :param utilization_before: share of all choices, one per expert before; they sum to 1
    :param utilization_after: the same, by the same indices; 0 for an expert that is gone
    """

    model_config = ConfigDict(extra="forbid")

    top_k_overlap: float
    top_k_overlap_kept: float | None = None
    replaced: float | None = None
    router_kl: float | None
    load_change: float
    load_cv_before: float
    load_cv_after: float
    dead_before: int
    dead_after: int
    utilization_before: list[float] = []
    utilization_after: list[float] = []


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


def routing_fidelity(
    before: RouterTrace,
    after: RouterTrace,
    kept: Sequence[int] | None = None,
    *,
    total: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> RoutingFidelity:
    """Compare two traces of the same tokens.

    The overlap of a token is the share of its experts before that are chosen after; a token whose experts are
    all gone counts as no overlap.

    :param before: [tokens, experts]
    :param after: [tokens, experts that are left]
    :param kept: which experts before are those of ``after``, in its order; None: all of them
    :param total: adds up a vector of sums over tokens with those of the other ranks, such as
        `profile.forward.sum_over_ranks`, which all ranks must call; by default the traces hold all tokens
    :raises ValueError: the traces are not of the same tokens, or ``kept`` does not name the experts of ``after``
    """
    experts = before.chosen.shape[1]
    columns = list(range(experts)) if kept is None else list(kept)
    _check_shapes(before, after, columns)
    loads = torch.zeros(2, experts, dtype=torch.float64)
    loads[0] = before.chosen.sum(dim=0)
    loads[1, columns] = after.chosen.sum(dim=0).double()
    sums = total(torch.cat([_sums_over_tokens(before, after, columns), loads.flatten()]))
    loads = sums[-loads.numel() :].reshape(2, experts)
    tokens, overlap, replaced, compared, divergence, explained, overlap_kept = sums[: -loads.numel()].tolist()
    count = max(tokens, 1.0)
    shares = loads / loads.sum(dim=-1, keepdim=True).clamp(min=1)
    return RoutingFidelity(
        top_k_overlap=overlap / count,
        top_k_overlap_kept=overlap_kept / count if explained == tokens else None,
        replaced=replaced / count,
        router_kl=max(divergence / count, 0.0) if compared == tokens else None,
        load_change=float((shares[1] - shares[0]).abs().sum() / 2),
        load_cv_before=load_cv(loads[0]),
        load_cv_after=load_cv(loads[1, columns]),
        dead_before=int((loads[0] == 0).sum()),
        dead_after=int((loads[1, columns] == 0).sum()),
        utilization_before=shares[0].tolist(),
        utilization_after=shares[1].tolist(),
    )


def _sums_over_tokens(before: RouterTrace, after: RouterTrace, columns: list[int]) -> torch.Tensor:
    """[7]: tokens; overlap; tokens whose experts were all replaced; tokens with probabilities on both sides and
    their divergence; tokens whose choice probabilities explain and their overlap with what is left of it.
    """
    tokens = len(before.chosen)
    left = before if columns == list(range(before.chosen.shape[1])) else restricted(before, columns)
    wanted = before.chosen.sum(dim=-1).double()
    again = (left.chosen & after.chosen).sum(dim=-1).double()
    replaced = ((again == 0) & (wanted > 0)).sum()
    compared = divergence = explained = overlap_kept = 0.0
    if left.probabilities is not None and after.probabilities is not None:
        p, q = (trace.probabilities.double().clamp(min=1e-12) for trace in (left, after))
        compared, divergence = tokens, float((p * (p / q).log()).sum())
    choice = _choice_among(before, columns)
    if choice is not None:
        explained, overlap_kept = tokens, float(_overlap(choice, after.chosen))
    overlap = (again / wanted.clamp(min=1)).sum()
    return torch.tensor(
        [tokens, float(overlap), float(replaced), compared, divergence, explained, overlap_kept],
        dtype=torch.float64,
    )


def _check_shapes(before: RouterTrace, after: RouterTrace, columns: list[int]) -> None:
    tokens, experts = before.chosen.shape
    if len(after.chosen) != tokens:
        raise ValueError(
            f"after has {len(after.chosen)} tokens, before {tokens}: run both models on the same batches."
        )
    if len(set(columns)) != len(columns) or any(not 0 <= column < experts for column in columns):
        raise ValueError(f"kept={columns} must be distinct indices under {experts}, the experts before.")
    if after.chosen.shape[1] != len(columns):
        raise ValueError(
            f"after has {after.chosen.shape[1]} experts and kept names {len(columns)}: name the index before of "
            "each expert that is left."
        )


def _overlap(wanted: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the share of ``wanted`` that is chosen; both boolean [tokens, experts]."""
    return ((wanted & chosen).sum(dim=-1).double() / wanted.sum(dim=-1).double().clamp(min=1)).sum()


def _choice_among(trace: RouterTrace, columns: list[int]) -> torch.Tensor | None:
    """What a router would choose if it had only some of its experts, boolean [tokens, len(columns)].

    None where it cannot be told: there are no probabilities, or the choice is not of the highest ones (a
    correction is added first, or groups of experts are chosen).
    """
    if columns == list(range(trace.chosen.shape[1])):
        return trace.chosen
    if trace.probabilities is None:
        return None
    values = trace.probabilities.double()
    lowest_chosen = values.masked_fill(~trace.chosen, torch.inf).amin(dim=-1)
    highest_other = values.masked_fill(trace.chosen, 0.0).amax(dim=-1)
    if bool((lowest_chosen < highest_other * (1 - _ROUNDING)).any()):
        return None
    # What was chosen and is left is chosen again: nothing above it has come. Equal probabilities do not matter so.
    order = (values + 2 * trace.chosen)[:, columns].argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(dim=-1)
    return place < trace.chosen.sum(dim=-1, keepdim=True)
