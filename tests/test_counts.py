"""Counts of experts against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompressor_moe.counts import (
    allowed_channels,
    allowed_counts,
    choose_counts,
    counts_to_measure,
    damage_curve,
    possible_total,
)
from llmcompressor_moe.plan import ExpertRoom

# Few distinct values, so that ties are common; sums of them are exact.
NATS = st.integers(0, 6).map(lambda value: value / 4)
DAMAGES = st.dictionaries(
    st.integers(0, 9),
    st.dictionaries(st.integers(0, 6), NATS, min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def choices(options: dict[int, list[int]], total: int) -> list[dict[int, int]]:
    """All of them, those first where the first layers lose least."""
    layers = sorted(options)
    found = itertools.product(*(sorted(options[layer]) for layer in layers))
    return [dict(zip(layers, counts, strict=True)) for counts in found if sum(counts) == total]


@given(DAMAGES, st.integers(0, 20))
def test_the_least_sum_for_the_total(damages, total):
    possible = choices(damages, total)
    assert (possible_total(damages, total) == total) == bool(possible)
    if not possible:
        with pytest.raises(ValueError, match="no choice of counts drops"):
            choose_counts(damages, total)
        return
    best = min(possible, key=lambda counts: sum(damages[layer][n] for layer, n in counts.items()))
    assert choose_counts(damages, total) == best
    assert choose_counts(dict(reversed(damages.items())), total) == best
    steps = {layer: {64 * n: nats for n, nats in counts.items()} for layer, counts in damages.items()}
    assert choose_counts(steps, 64 * total) == {layer: 64 * count for layer, count in best.items()}


@given(
    st.dictionaries(st.integers(0, 3), st.sets(st.integers(0, 5), min_size=1), max_size=3), st.integers(0, 12)
)
def test_the_largest_possible_total(options, wanted):
    totals = [sum(counts) for counts in itertools.product(*options.values())]
    assert possible_total(options, wanted) == max((t for t in totals if t <= wanted), default=None)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.integers(1, 30), st.integers(0, 400).map(lambda value: value / 7), min_size=1, max_size=5
    )
)
def test_curves_start_at_zero_and_never_fall(measured):
    most = max(measured)
    curve = list(damage_curve(measured, range(40)).items())
    assert curve[0] == (0, 0.0) and [count for count, _ in curve] == list(range(most + 1))
    assert all(one <= other + 1e-9 for (_, one), (_, other) in itertools.pairwise(curve))
    assert curve[-1][1] <= max(measured.values()) + 1e-9
    ascending = dict(zip(sorted(measured), sorted(measured.values()), strict=True))
    assert {count: damage_curve(ascending, [count])[count] for count in ascending} == pytest.approx(ascending)


def test_noise_is_pooled_and_nothing_measured_costs_nothing():
    assert damage_curve({2: 3.0, 4: 1.0}, [2, 4]) == pytest.approx({2: 2.0, 4: 2.0})
    assert damage_curve({}, [0, 2]) == {0: 0.0}


@pytest.mark.parametrize(
    "room, round_to, counts",
    [
        (ExpertRoom(8, 2), None, [0, 1, 2, 3, 4, 5, 6]),
        (ExpertRoom(8, 2), 4, [0, 4]),
        (ExpertRoom(12, 4, 3), None, [0, 3, 6]),
        (ExpertRoom(12, 2, 3), 2, [0, 6]),
        (ExpertRoom(6, 2), 4, [2]),
        (ExpertRoom(6, 5), 4, []),
        (ExpertRoom(4, 6), None, [0]),
    ],
)
def test_what_a_layer_may_lose(room, round_to, counts):
    assert allowed_counts(room, round_to) == counts


@pytest.mark.parametrize(
    "width, step, counts",
    [(64, 16, [0, 16, 32, 48]), (20, 8, [0, 4, 12]), (8, 8, [0]), (4, 8, [0]), (3, 1, [0, 1, 2])],
)
def test_what_experts_may_lose(width, step, counts):
    assert allowed_channels(width, step) == counts


def test_layers_are_cut_around_their_share():
    whole, grouped = list(range(15)), list(range(0, 15, 4))
    measured = counts_to_measure({0: whole, 3: grouped}, {0: 4, 3: 4}, 8)
    assert measured == {0: [2, 4, 8, 12], 3: [4, 8, 12]}
    # Three times its share is not enough where the others have no room.
    assert counts_to_measure({0: whole, 3: [0]}, {0: 4, 3: 9}, 13) == {0: [2, 4, 8, 14], 3: []}
