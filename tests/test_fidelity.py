"""How far a router moved: recomputed token by token in numpy, and the limits that are known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompressor_moe.profile.routing import RouterTrace
from llmcompressor_moe.routing.fidelity import RoutingFidelity, load_cv, restricted, routing_fidelity


def trace(logits: torch.Tensor, top_k: int) -> RouterTrace:
    """What a softmax router with these logits [tokens, experts] decides."""
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(1, logits.topk(top_k, dim=-1).indices, True)
    return RouterTrace(chosen, logits.float().softmax(dim=-1))


def logits(tokens: int, experts: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(before: RouterTrace, after: RouterTrace, kept: list[int] | None = None) -> dict[str, float]:
    """Every figure from its definition, one token and one expert at a time."""
    tokens, experts = before.chosen.shape
    kept = list(range(experts)) if kept is None else kept
    overlaps, overlaps_kept, divergences, replaced = [], [], [], 0
    loads = np.zeros((2, experts))
    for token in range(tokens):
        old = {e for e in range(experts) if before.chosen[token, e]}
        new = {kept[column] for column in range(len(kept)) if after.chosen[token, column]}
        scores = before.probabilities[token].double().numpy()
        masked = set(sorted(kept, key=lambda e: -scores[e])[: len(old)])
        overlaps.append(len(old & new) / len(old) if old else 0.0)
        overlaps_kept.append(len(masked & new) / len(masked) if masked else 0.0)
        replaced += not old & new
        for side, experts_of in enumerate((old, new)):
            for expert in experts_of:
                loads[side, expert] += 1
        p = scores[kept] / (scores[kept].sum() if len(kept) < experts else 1)
        p, q = p.clip(1e-12), after.probabilities[token].double().numpy().clip(1e-12)
        divergences.append(sum(p[c] * math.log(p[c] / q[c]) for c in range(len(kept))))
    shares = [load / max(load.sum(), 1) for load in loads]
    left = loads[1][kept]
    return {
        "top_k_overlap": float(np.mean(overlaps)),
        "top_k_overlap_kept": float(np.mean(overlaps_kept)),
        "replaced": replaced / tokens,
        "router_kl": max(float(np.mean(divergences)), 0.0),
        "load_change": sum(abs(shares[0][e] - shares[1][e]) for e in range(experts)) / 2,
        "load_cv_before": float(np.std(loads[0]) / np.mean(loads[0])),
        "load_cv_after": float(np.std(left) / np.mean(left)),
        "dead_before": sum(load == 0 for load in loads[0]),
        "dead_after": sum(load == 0 for load in left),
        "utilization_before": shares[0].tolist(),
        "utilization_after": shares[1].tolist(),
    }


def assert_equal(found: RoutingFidelity, expected: dict[str, float]) -> None:
    # Probabilities are fp32, so sums over them are good to some 1e-7.
    values = found.model_dump()
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


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
    assert found.top_k_overlap == found.top_k_overlap_kept == 1
    assert found.router_kl == found.replaced == 0
    assert found.utilization_before == found.utilization_after
    assert found.load_change == 0
    assert found.load_cv_before == found.load_cv_after
    assert found.dead_before == found.dead_after


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.floats(0, 3))
def test_two_routers_as_by_hand(size: tuple[int, int, int], seed: int, noise: float) -> None:
    tokens, experts, top_k = size
    first = logits(tokens, experts, seed)
    sides = trace(first, top_k), trace(first + noise * logits(tokens, experts, seed + 1), top_k)
    found = routing_fidelity(*sides)
    assert_equal(found, brute_force(*sides))
    assert 0 <= found.top_k_overlap <= 1 and 0 <= found.load_change <= 1
    assert found.router_kl >= 0
    assert sum(found.utilization_before) == pytest.approx(1) == sum(found.utilization_after)


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.randoms(use_true_random=False))
def test_a_router_with_its_experts_permuted(size: tuple[int, int, int], seed: int, random) -> None:
    tokens, experts, top_k = size
    order = list(range(experts))
    random.shuffle(order)
    before = trace(logits(tokens, experts, seed), top_k)
    after = RouterTrace(before.chosen[:, order], before.probabilities[:, order])
    found = routing_fidelity(before, after)
    assert_equal(found, brute_force(before, after))
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
    assert (found.top_k_overlap, found.load_change, found.replaced) == (0, 1, 1)


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


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.floats(0, 3), st.data())
def test_a_router_that_lost_experts_as_by_hand(
    size: tuple[int, int, int], seed: int, noise: float, data: st.DataObject
) -> None:
    tokens, experts, top_k = size
    kept = data.draw(st.lists(st.integers(0, experts - 1), min_size=top_k, unique=True).map(sorted))
    first = logits(tokens, experts, seed)
    before = trace(first, top_k)
    after = trace((first + noise * logits(tokens, experts, seed + 1))[:, kept], top_k)
    found = routing_fidelity(before, after, kept)
    assert_equal(found, brute_force(before, after, kept))
    gone = set(range(experts)) - set(kept)
    assert all(found.utilization_after[expert] == 0 for expert in gone)
    if noise == 0:
        # Only masked: what is left is chosen as before, and what went is replaced by the next best.
        assert found.top_k_overlap_kept == 1
        assert found.router_kl == pytest.approx(0, abs=1e-6)


def test_parts_of_the_tokens_add_up_and_only_the_caller_talks_to_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_args: object) -> None:
        raise AssertionError("one rank alone would wait for ever")

    monkeypatch.setattr("torch.distributed.all_reduce", forbidden)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    first, kept = logits(11, 6, 0), [0, 2, 3, 5]
    before = trace(first, 2)
    after = trace((first + logits(11, 6, 1))[:, kept], 2)
    whole = routing_fidelity(before, after, kept)
    parts = [
        [RouterTrace(side.chosen[rows], side.probabilities[rows]) for side in (before, after)]
        for rows in (slice(0, 4), slice(4, 11))
    ]
    sums: list[torch.Tensor] = []
    for part in parts:
        routing_fidelity(*part, kept, total=lambda values: sums.append(values) or values)
    for part in parts:
        found = routing_fidelity(*part, kept, total=lambda _values: sum(sums))
        assert_equal(found, whole.model_dump())
    # A rank without tokens has seen no probabilities either; the others' count.
    nothing = RouterTrace(before.chosen[:0], None), RouterTrace(after.chosen[:0], None)
    alone = routing_fidelity(*nothing, kept, total=lambda values: values + sum(sums))
    assert_equal(alone, whole.model_dump())


def test_a_router_that_lost_two_experts_worked_out_by_hand() -> None:
    """4 experts, top-2, experts 0 and 3 go: 1 and 2 are chosen by every token."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.2, 0.3]])
    before = RouterTrace(torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]], dtype=torch.bool), p)
    q = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.5, 0.5]])
    found = routing_fidelity(before, RouterTrace(torch.ones(3, 2, dtype=torch.bool), q), [1, 2])
    assert found.top_k_overlap == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert found.top_k_overlap_kept == 1
    assert found.replaced == pytest.approx(1 / 3)
    third = 1 / 3 * math.log((1 / 3) / 0.5) + 2 / 3 * math.log((2 / 3) / 0.5)
    assert found.router_kl == pytest.approx(third / 3, rel=1e-5)
    assert found.utilization_before == pytest.approx([2 / 6, 1 / 6, 1 / 6, 2 / 6])
    assert found.utilization_after == [0, 0.5, 0.5, 0]
    assert found.load_change == pytest.approx(4 / 6)
    assert (found.load_cv_after, found.dead_before, found.dead_after) == (0, 0, 0)


def test_a_router_that_collapsed() -> None:
    """Every token goes to expert 0 of 4."""
    before = trace(torch.eye(4).repeat(3, 1), 1)
    after = trace(torch.tensor([[9.0, 0, 0, 0]]).repeat(12, 1), 1)
    found = routing_fidelity(before, after)
    assert found.utilization_before == [0.25] * 4
    assert found.utilization_after == [1, 0, 0, 0]
    assert (found.top_k_overlap, found.replaced, found.load_change) == (0.25, 0.75, 0.75)
    assert (found.load_cv_before, found.dead_after) == (0, 3)
    assert found.load_cv_after == pytest.approx(math.sqrt(3))


def test_ties_do_not_make_a_masked_choice_differ() -> None:
    before = RouterTrace(torch.tensor([[0, 1, 0, 1]], dtype=torch.bool), torch.full((1, 4), 0.25))
    after = RouterTrace(torch.tensor([[0, 1, 1]], dtype=torch.bool), torch.full((1, 3), 1 / 3))
    assert routing_fidelity(before, after, [0, 1, 3]).top_k_overlap_kept == 1


def test_a_choice_that_probabilities_do_not_explain_is_not_made_anew() -> None:
    """A correction was added before choosing: the likeliest expert is left aside."""
    before = RouterTrace(torch.tensor([[0, 1, 0]], dtype=torch.bool), torch.tensor([[0.6, 0.3, 0.1]]))
    after = RouterTrace(torch.tensor([[1, 0]], dtype=torch.bool), torch.tensor([[0.7, 0.3]]))
    assert routing_fidelity(before, after, [0, 1]).top_k_overlap_kept is None
    assert routing_fidelity(RouterTrace(before.chosen, None), after, [0, 1]).top_k_overlap_kept is None
    # Where nothing is gone there is nothing to choose anew.
    assert routing_fidelity(before, before).top_k_overlap_kept == 1


@pytest.mark.parametrize(
    ("kept", "message"),
    [([0, 1], "after has 3 experts and kept names 2"), ([0, 1, 4], "under 4"), ([0, 1, 1], "distinct")],
)
def test_experts_that_do_not_fit_are_named(kept: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routing_fidelity(trace(logits(5, 4, 0), 2), trace(logits(5, 3, 0), 2), kept)
    with pytest.raises(ValueError, match="after has 4 tokens, before 5"):
        routing_fidelity(trace(logits(5, 4, 0), 2), trace(logits(4, 4, 0), 2))


def test_a_report_from_before_there_were_more_figures_loads() -> None:
    old = {
        "top_k_overlap": 0.5,
        "router_kl": None,
        "load_change": 0.1,
        "load_cv_before": 0.2,
        "load_cv_after": 0.3,
        "dead_before": 0,
        "dead_after": 1,
    }
    found = RoutingFidelity.model_validate(old)
    assert found.utilization_after == [] and found.replaced is None


@pytest.mark.parametrize(
    ("load", "expected"), [([4, 4, 4], 0.0), ([0, 0, 0], 0.0), ([12, 0, 0, 0], math.sqrt(3)), ([1, 3], 0.5)]
)
def test_variation_of_load(load: list[int], expected: float) -> None:
    assert load_cv(torch.tensor(load, dtype=torch.float64)) == pytest.approx(expected)
