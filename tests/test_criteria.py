"""Criteria and metrics against brute force and hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompressor_moe.criteria import EXPERT_CRITERIA, METRICS, expert_criterion, part_metric
from llmcompressor_moe.criteria.experts import ScoreInput
from llmcompressor_moe.profile import ExpertProfile


def scored(criterion: str, profile: ExpertProfile | None = None, **given_) -> list[float | None]:
    values = {"num_samples": 1, "num_experts": 3, "weights": [], "layer": 0, "seed": 0} | given_
    return expert_criterion(criterion).score(ScoreInput(profile=profile, **values))


def order_of_dropping(similarity: list[list[float]]) -> list[int]:
    """Again and again: of all pairs that are left take the most similar, and drop its member that is closer
    to the rest.
    """
    left, gone = list(range(len(similarity))), []
    while len(left) > 1:
        pairs = [(similarity[a][b], a, b) for a in left for b in left if a < b]
        highest = max(pair[0] for pair in pairs)
        _, a, b = next(pair for pair in pairs if pair[0] == highest)

        def closeness(expert: int, left: tuple[int, ...] = tuple(left)) -> float:
            return math.fsum(similarity[expert][other] for other in left if other != expert)

        going = b if closeness(b) > closeness(a) else a
        gone.append(going)
        left.remove(going)
    return [*gone, *left]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6).flatmap(lambda n: st.lists(st.integers(-64, 64), min_size=n * n, max_size=n * n)))
def test_redundancy_is_the_greedy_order(values):
    count = math.isqrt(len(values))
    matrix = torch.tensor(values, dtype=torch.float64).view(count, count) / 64
    matrix = ((matrix + matrix.T) / 2).fill_diagonal_(1.0)
    profile = ExpertProfile(
        routed_tokens=[1] * count, gate_weight=[1.0] * count, output_similarity=matrix.tolist()
    )
    scores = scored("redundancy", profile)
    assert len(set(scores)) == count, "no ties: any number of lowest scores is a step of the greedy order"
    assert sorted(range(count), key=lambda expert: scores[expert]) == order_of_dropping(matrix.tolist())


def test_redundancy_drops_one_of_two_twins():
    similarity = [[1.0, 0.1, 0.99, 0.0], [0.1, 1.0, 0.3, 0.2], [0.99, 0.3, 1.0, 0.1], [0.0, 0.2, 0.1, 1.0]]
    profile = ExpertProfile(routed_tokens=[1] * 4, gate_weight=[1.0] * 4, output_similarity=similarity)
    scores = scored("redundancy", profile)
    assert min(range(4), key=scores.__getitem__) == 2, (
        "expert 2 is the twin that is also closer to the others"
    )
    assert scores[2] == pytest.approx(0.01)
    # Its twin is safe once it is gone: nothing like it is left.
    assert max(range(4), key=scores.__getitem__) in (0, 3) and scores[0] > 0.5


PROFILE = ExpertProfile(
    routed_tokens=[6, 2, 0, 0],
    gate_weight=[3.0, 1.0, 0.0, 0.0],
    routing_probability=[4.0, 2.0, 1.0, 1.0],
    output_norm=[12.0, 10.0, 0.0, 0.0],
    weighted_output_norm=[6.0, 5.0, 0.0, 0.0],
)


def test_scores_by_hand():
    assert scored("router_score", PROFILE, num_samples=2) == [2.0, 1.0, 0.5, 0.5]
    masked = PROFILE.model_copy(update={"routing_probability": None})
    assert scored("router_score", masked, num_samples=2) == [1.5, 0.5, 0.0, 0.0]
    assert scored("frequency", PROFILE) == [0.75, 0.25, 0.0, 0.0]
    assert scored("reap", PROFILE) == [1.0, 2.5, None, None]
    assert scored("output_norm", PROFILE) == [2.0, 5.0, None, None]


def test_weight_norm_is_frobenius_over_all_matrices():
    experts = [[torch.full((2, 3), 2.0), torch.ones(4, 1)], [torch.zeros(2, 3), torch.ones(1, 1)]]
    assert scored("weight_norm", weights=experts) == pytest.approx([math.sqrt(24 + 4), 1.0])


def test_random_depends_on_seed_and_layer_only():
    first = scored("random", num_experts=8, seed=3, layer=2)
    assert first == scored("random", PROFILE, num_experts=8, seed=3, layer=2)
    assert first != scored("random", num_experts=8, seed=4, layer=2)
    assert first != scored("random", num_experts=8, seed=3, layer=1)
    metric = METRICS["random"].score
    assert metric([3, 1, 2], 5) == metric([1, 2, 3], 5) != metric([1, 2, 3], 6)


def test_last_prefers_the_last():
    assert METRICS["last"].score([1, 4, 2], 0) == {1: 1.0, 4: 4.0, 2: 2.0}


@pytest.mark.parametrize("name", sorted(EXPERT_CRITERIA))
def test_every_criterion_names_its_source_and_what_it_needs(name):
    criterion = EXPERT_CRITERIA[name]
    assert criterion.source
    assert bool(criterion.statistics) == (name not in ("weight_norm", "random"))


@pytest.mark.parametrize("name", sorted(set(EXPERT_CRITERIA) - {"weight_norm"}))
def test_weights_are_read_for_a_criterion_of_weights_only(name):
    """Those of an opened checkpoint may be 20 GB per layer once they are decoded."""

    def weights():
        raise AssertionError("weights were read")
        yield

    similar = torch.eye(len(PROFILE.routed_tokens)).tolist()
    scored(name, PROFILE.model_copy(update={"output_similarity": similar}), weights=weights())
    with pytest.raises(AssertionError, match="were read"):
        scored("weight_norm", weights=weights())


def test_data_without_statistics_is_refused():
    for name, criterion in EXPERT_CRITERIA.items():
        if criterion.statistics:
            with pytest.raises(ValueError, match="Layer 5 has no statistics"):
                scored(name, None, layer=5)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError, match=r"criterion='reaper' is unknown; choose one of .*reap.*router_score"
    ):
        expert_criterion("reaper")
    with pytest.raises(
        ValueError, match=r"metric='cosin' is unknown; choose one of cosine, kl, last, random"
    ):
        part_metric("cosin")
