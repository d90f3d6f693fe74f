"""Decisions against brute force, and properties that hold for all scores."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmcompressor_moe.plan import (
    ExpertRoom,
    amount_of,
    experts_to_drop,
    longest_run_beyond,
    parts_to_drop,
    run_to_drop,
)

# Few distinct values, so that ties are common.
SCORE = st.one_of(st.integers(-3, 3).map(float), st.floats(-10, 10, allow_nan=False))
PARTS = st.dictionaries(st.integers(0, 12), SCORE, min_size=1, max_size=8)


@given(PARTS, st.data())
def test_parts_are_the_best_subset(scores, data):
    protect = data.draw(st.sets(st.sampled_from(sorted(scores))))
    free = [index for index in scores if index not in protect]
    assume(free)
    count = data.draw(st.integers(1, len(free)))
    highest = data.draw(st.booleans())
    chosen = parts_to_drop(scores, count=count, drop_highest=highest, protect=protect)
    assert chosen == sorted(set(chosen)) and len(chosen) == count and not set(chosen) & protect
    total = sum(scores[index] for index in chosen)
    best = (max if highest else min)(
        sum(scores[i] for i in subset) for subset in itertools.combinations(free, count)
    )
    assert total == pytest.approx(best)
    # The order in which scores are given plays no role.
    assert (
        parts_to_drop(dict(reversed(scores.items())), count=count, drop_highest=highest, protect=protect)
        == chosen
    )


def test_equal_scores_go_by_index():
    assert parts_to_drop({4: 1.0, 2: 1.0, 3: 1.0, 9: 0.5}, count=2) == [2, 3]


@given(PARTS, SCORE, st.booleans())
def test_threshold_takes_what_is_strictly_beyond(scores, threshold, highest):
    beyond = sorted(i for i, score in scores.items() if (score > threshold if highest else score < threshold))
    if len(beyond) == len(scores):
        with pytest.raises(ValueError, match=r"threshold=.* would drop all"):
            parts_to_drop(scores, threshold=threshold, drop_highest=highest)
    else:
        assert parts_to_drop(scores, threshold=threshold, drop_highest=highest) == beyond


def test_more_parts_than_are_free():
    with pytest.raises(ValueError, match="3 parts are to be dropped, but only 2 are not protected"):
        parts_to_drop({0: 1.0, 1: 2.0, 2: 3.0}, count=3, protect=[1])


@given(st.lists(SCORE, min_size=2, max_size=8), st.data())
def test_run_is_the_best_unprotected_one(values, data):
    blocks = sorted(data.draw(st.sets(st.integers(0, 20), min_size=len(values), max_size=len(values))))
    length = data.draw(st.integers(1, len(blocks) - 1))
    scores = {blocks[i]: values[i] for i in range(len(blocks) - length + 1)}
    protect = data.draw(st.sets(st.sampled_from(blocks), max_size=2))
    highest = data.draw(st.booleans())
    runs = [blocks[i : i + length] for i in range(len(blocks) - length + 1)]
    free = [run for run in runs if not set(run) & protect]
    if not free:
        with pytest.raises(ValueError, match=f"No run of {length} neighbouring blocks"):
            run_to_drop(scores, blocks, length, drop_highest=highest, protect=protect)
        return
    chosen = run_to_drop(scores, blocks, length, drop_highest=highest, protect=protect)
    assert chosen in free
    assert scores[chosen[0]] == (max if highest else min)(scores[run[0]] for run in free)
    assert chosen == next(run for run in free if scores[run[0]] == scores[chosen[0]]), (
        "the first of equal runs"
    )


@given(st.lists(st.sampled_from([0.1, 0.9]), min_size=1, max_size=10), st.sets(st.integers(0, 9), max_size=3))
def test_longest_run_beyond_a_threshold(values, protect):
    blocks = list(range(len(values)))
    scores = dict(enumerate(values))
    good = [i in protect or value < 0.5 for i, value in enumerate(values)]
    assume(any(value < 0.5 for value in values))
    runs = [
        blocks[start:stop]
        for start in blocks
        for stop in range(start + 1, len(blocks) + 1)
        if not any(good[start:stop])
    ]
    expected = max(runs, key=lambda run: (len(run), -run[0]), default=[])
    assert longest_run_beyond(scores, blocks, 0.5, drop_highest=True, protect=protect) == expected


@st.composite
def expert_problems(draw, groups: bool = False):
    """Layers with the same number of groups; scores, floors and an amount."""
    num_groups = draw(st.sampled_from([2, 3])) if groups else 1
    layers = draw(st.sets(st.integers(0, 9), min_size=1, max_size=3))
    scores, rooms = {}, {}
    for layer in layers:
        count = num_groups * draw(st.integers(2, 4))
        scores[layer] = draw(st.lists(st.one_of(st.none(), SCORE), min_size=count, max_size=count))
        rooms[layer] = ExpertRoom(count, draw(st.integers(1, count)), num_groups)
    return scores, rooms, num_groups


def number(score: float | None) -> float:
    return -1e6 if score is None else score


@given(expert_problems(), st.integers(1, 8))
def test_layer_scope_is_the_best_subset_of_each_layer(problem, count):
    scores, rooms, _ = problem
    if any(room.num_experts - count < room.floor for room in rooms.values()):
        with pytest.raises(ValueError, match=r"it needs at least"):
            experts_to_drop(scores, rooms, count, "layer")
        return
    dropped = experts_to_drop(scores, rooms, count, "layer")
    assert set(dropped) == set(scores)
    for layer, experts in dropped.items():
        assert experts == sorted(set(experts)) and len(experts) == count
        order = sorted(range(len(scores[layer])), key=lambda e: (number(scores[layer][e]), e))
        assert set(experts) == set(order[:count])


@settings(max_examples=60, deadline=None)
@given(expert_problems(), st.integers(1, 9))
def test_global_scope_is_the_best_subset_of_all(problem, total):
    scores, rooms, _ = problem
    room = sum(r.num_experts - r.floor for r in rooms.values())
    if total > room:
        with pytest.raises(
            ValueError, match=f"{total} experts are to be dropped in all, but the floors allow {room}"
        ):
            experts_to_drop(scores, rooms, 0, "global", total=total)
        return
    dropped = experts_to_drop(scores, rooms, 0, "global", total=total)
    assert sum(map(len, dropped.values())) == total and all(dropped.values())
    for layer, experts in dropped.items():
        assert rooms[layer].num_experts - len(experts) >= rooms[layer].floor

    def cheapest(layer: int, count: int) -> float:
        return sum(sorted(map(number, scores[layer]))[:count])

    splits = itertools.product(
        *(range(rooms[layer].num_experts - rooms[layer].floor + 1) for layer in scores)
    )
    best = min(sum(map(cheapest, scores, split)) for split in splits if sum(split) == total)
    assert sum(
        number(scores[layer][e]) for layer, experts in dropped.items() for e in experts
    ) == pytest.approx(best)


@given(expert_problems(groups=True), st.integers(1, 4))
def test_groups_lose_the_same_number_and_their_lowest(problem, per_group):
    scores, rooms, num_groups = problem
    count = per_group * num_groups
    assume(all(room.num_experts - count >= room.floor for room in rooms.values()))
    for layer, experts in experts_to_drop(scores, rooms, count, "layer").items():
        size = len(scores[layer]) // num_groups
        for group in range(num_groups):
            members = range(group * size, (group + 1) * size)
            order = sorted(members, key=lambda e: (number(scores[layer][e]), e))
            assert set(experts) & set(members) == set(order[:per_group])


@given(expert_problems(groups=True), st.integers(1, 3))
def test_groups_in_global_scope(problem, rounds):
    scores, rooms, num_groups = problem
    total = rounds * num_groups
    assume(sum((r.num_experts - r.floor) // num_groups for r in rooms.values()) >= rounds)
    dropped = experts_to_drop(scores, rooms, 0, "global", total=total)
    assert sum(map(len, dropped.values())) == total
    for layer, experts in dropped.items():
        size = len(scores[layer]) // num_groups
        assert len({sum(e // size == group for e in experts) for group in range(num_groups)}) == 1
        assert rooms[layer].num_experts - len(experts) >= rooms[layer].floor


def test_a_number_that_does_not_divide_into_groups():
    rooms = {0: ExpertRoom(8, 4, 2)}
    with pytest.raises(ValueError, match=r"num_drop=3 in layer 0.*2 groups.*multiple of 2"):
        experts_to_drop({0: [0.0] * 8}, rooms, 3, "layer")
    with pytest.raises(ValueError, match=r"multiple of 2"):
        experts_to_drop({0: [0.0] * 8}, rooms, 0, "global", total=3)


def test_experts_without_a_score_go_first_and_ties_go_by_index():
    scores = {0: [0.0, -5.0, None, 0.0, None]}
    rooms = {0: ExpertRoom(5, 1)}
    assert [experts_to_drop(scores, rooms, n, "layer")[0] for n in (1, 2, 3, 4)] == [
        [2],
        [2, 4],
        [1, 2, 4],
        [0, 1, 2, 4],
    ]
    two = {3: [1.0, 0.0], 1: [0.0, 1.0]}
    assert experts_to_drop(two, {3: ExpertRoom(2, 1), 1: ExpertRoom(2, 1)}, 0, "global", total=1) == {1: [0]}


@given(st.integers(2, 400), st.data())
def test_ratio_never_drops_more_than_it_says(total, data):
    wanted = data.draw(st.integers(1, total - 1))
    assert amount_of(None, wanted / total, total, "experts") == wanted
    assert amount_of(wanted, None, total, "experts") == wanted


def test_amounts_that_cannot_be():
    with pytest.raises(ValueError, match=r"drop_ratio=0.1 of 8 experts drops none; use at least 0.125"):
        amount_of(None, 0.1, 8, "experts")
    with pytest.raises(ValueError, match=r"num_drop=8 would drop all 8 experts"):
        amount_of(8, None, 8, "experts")
