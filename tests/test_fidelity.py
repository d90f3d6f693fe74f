"""How far a router moved: recomputed token by token in numpy, and the limits that are known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompressor_moe.profile.routing import RouterTrace
from llmcompressor_moe.quantization.fidelity import load_cv, restricted, routing_fidelity


def trace(logits: torch.Tensor, top_k: int) -> RouterTrace:
    """What a softmax router with these logits [tokens, experts] decides."""
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(1, logits.topk(top_k, dim=-1).indices, True)
    return RouterTrace(chosen, logits.float().softmax(dim=-1))


def logits(tokens: int, experts: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(before: RouterTrace, after: RouterTrace) -> dict[str, float]:
    """Every figure from its definition, one token and one expert at a time."""
    tokens, experts = before.chosen.shape
    overlaps, divergences = [], []
    loads = np.zeros((2, experts))
    for token in range(tokens):
        sets = [{e for e in range(experts) if side.chosen[token, e]} for side in (before, after)]
        overlaps.append(len(sets[0] & sets[1]) / len(sets[0]) if sets[0] else 0.0)
        for side, experts_of in enumerate(sets):
            for expert in experts_of:
                loads[side, expert] += 1
        p, q = (side.probabilities[token].double().numpy().clip(1e-12) for side in (before, after))
        divergences.append(sum(p[e] * math.log(p[e] / q[e]) for e in range(experts)))
    shares = [load / max(load.sum(), 1) for load in loads]
    return {
        "top_k_overlap": float(np.mean(overlaps)),
        "router_kl": max(float(np.mean(divergences)), 0.0),
        "load_change": sum(abs(shares[0][e] - shares[1][e]) for e in range(experts)) / 2,
        "load_cv_before": float(np.std(loads[0]) / np.mean(loads[0])),
        "load_cv_after": float(np.std(loads[1]) / np.mean(loads[1])),
        "dead_before": sum(load == 0 for load in loads[0]),
        "dead_after": sum(load == 0 for load in loads[1]),
    }


sizes = st.tuples(st.integers(1, 20), st.integers(2, 9)).flatmap(
    lambda size: st.tuples(st.just(size[0]), st.just(size[1]), st.integers(1, size[1]))
)
seeds = st.integers(0, 10_000)


@settings(max_examples=60, deadline=None)
@given(sizes, seeds)
def test_a_router_and_itself(size: tuple[int, int, int], seed: int) -> None:
    tokens, experts, top_k = size
    same = trace(logits(tokens, experts, seed), top_k)
    found = routing_fidelity(same, same)
    assert found.top_k_overlap == 1
    assert found.router_kl == 0
    assert found.load_change == 0
    assert found.load_cv_before == found.load_cv_after
    assert found.dead_before == found.dead_after


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.floats(0, 3))
def test_two_routers_as_by_hand(size: tuple[int, int, int], seed: int, noise: float) -> None:
    tokens, experts, top_k = size
    first = logits(tokens, experts, seed)
    sides = trace(first, top_k), trace(first + noise * logits(tokens, experts, seed + 1), top_k)
    found = routing_fidelity(*sides).model_dump()
    assert found == pytest.approx(brute_force(*sides), rel=1e-6, abs=1e-9)
    assert 0 <= found["top_k_overlap"] <= 1 and 0 <= found["load_change"] <= 1
    assert found["router_kl"] >= 0


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.randoms(use_true_random=False))
def test_a_router_with_its_experts_permuted(size: tuple[int, int, int], seed: int, random) -> None:
    tokens, experts, top_k = size
    order = list(range(experts))
    random.shuffle(order)
    before = trace(logits(tokens, experts, seed), top_k)
    after = RouterTrace(before.chosen[:, order], before.probabilities[:, order])
    found = routing_fidelity(before, after)
    assert found.model_dump() == pytest.approx(brute_force(before, after), rel=1e-6, abs=1e-9)
    # Who carries the load has changed, not how evenly it is carried.
    assert found.load_cv_after == pytest.approx(found.load_cv_before)
    assert found.dead_after == found.dead_before


def test_a_shift_by_one_expert() -> None:
    """Worked out by hand: 4 experts, top-2, three tokens; every expert moves one place on."""
    chosen = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    shifted = chosen.roll(1, dims=1)
    found = routing_fidelity(RouterTrace(chosen, None), RouterTrace(shifted, None))
    assert found.top_k_overlap == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert found.router_kl is None
    # Shares 3/6, 2/6, 1/6, 0 become 0, 3/6, 2/6, 1/6.
    assert found.load_change == pytest.approx((3 + 1 + 1 + 1) / 6 / 2)
    assert (found.dead_before, found.dead_after) == (1, 1)
    assert found.load_cv_before == pytest.approx(math.sqrt(5 / 4) / 1.5)


def test_experts_that_nobody_chooses_are_counted() -> None:
    before = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)
    after = torch.tensor([[1, 0, 0, 0]] * 3, dtype=torch.bool)
    found = routing_fidelity(RouterTrace(before, None), RouterTrace(after, None))
    assert (found.dead_before, found.dead_after) == (1, 3)
    assert found.top_k_overlap == pytest.approx(1 / 3)
    assert found.load_change == pytest.approx(2 / 3)
    assert found.load_cv_after == pytest.approx(math.sqrt(3))


def test_no_expert_in_common() -> None:
    before = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)
    found = routing_fidelity(RouterTrace(before, None), RouterTrace(~before, None))
    assert (found.top_k_overlap, found.load_change) == (0, 1)


def test_probabilities_on_one_side_only_give_no_divergence() -> None:
    one = trace(logits(5, 4, 0), 2)
    assert routing_fidelity(one, RouterTrace(one.chosen, None)).router_kl is None
    assert routing_fidelity(RouterTrace(one.chosen, None), one).router_kl is None


def test_a_divergence_by_hand_that_survives_a_zero() -> None:
    chosen = torch.tensor([[1, 0]], dtype=torch.bool)
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    found = routing_fidelity(RouterTrace(chosen, p), RouterTrace(chosen, q))
    assert found.router_kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    never = routing_fidelity(RouterTrace(chosen, p), RouterTrace(chosen, torch.tensor([[1.0, 0.0]])))
    assert math.isfinite(never.router_kl) and never.router_kl > 1


def test_no_token_at_all() -> None:
    empty = RouterTrace(torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0, 4))
    found = routing_fidelity(empty, empty)
    assert (found.load_change, found.load_cv_before, found.dead_before, found.dead_after) == (0, 0, 4, 4)


# Experts that are gone


@settings(max_examples=40, deadline=None)
@given(sizes, seeds, st.data())
def test_a_trace_without_some_experts(size: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    tokens, experts, top_k = size
    whole = trace(logits(tokens, experts, seed), top_k)
    kept = data.draw(st.lists(st.integers(0, experts - 1), min_size=1, unique=True).map(sorted))
    found = restricted(whole, kept)
    assert torch.equal(found.chosen, whole.chosen[:, kept])
    # A softmax over the experts that are left.
    expected = logits(tokens, experts, seed)[:, kept].softmax(dim=-1)
    torch.testing.assert_close(found.probabilities.double(), expected, atol=1e-6, rtol=1e-5)
    assert restricted(RouterTrace(whole.chosen, None), kept).probabilities is None


def test_a_token_whose_experts_are_all_gone_counts_as_no_overlap() -> None:
    before = RouterTrace(torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=torch.bool), None)
    after = RouterTrace(torch.tensor([[1, 0], [1, 0]], dtype=torch.bool), None)
    found = routing_fidelity(restricted(before, [1, 2]), after)
    assert found.top_k_overlap == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("load", "expected"), [([4, 4, 4], 0.0), ([0, 0, 0], 0.0), ([12, 0, 0, 0], math.sqrt(3)), ([1, 3], 0.5)]
)
def test_variation_of_load(load: list[int], expected: float) -> None:
    assert load_cv(torch.tensor(load, dtype=torch.float64)) == pytest.approx(expected)
