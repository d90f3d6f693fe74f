"""The solver against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompressor_moe.quantization.allocation import BudgetError, Option, allocate
from llmcompressor_moe.quantization.planning import Budget, choose_schemes, mean_bits
from llmcompressor_moe.quantization.sizes import StoredSize

# Real errors span many orders of magnitude between 2 and 16 bits.
errors = st.one_of(st.just(0.0), st.floats(-12, 6).map(lambda exponent: 10.0**exponent))
options = st.builds(Option, cost=st.integers(0, 40).map(float), error=errors)
groups = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def brute_force(problem: list[list[Option]], budget: float) -> float | None:
    fitting = [
        sum(option.error for option in choice)
        for choice in itertools.product(*problem)
        if sum(option.cost for option in choice) <= budget
    ]
    return min(fitting, default=None)


@settings(max_examples=100, deadline=None)
@given(groups, st.integers(0, 120))
def test_as_good_as_brute_force(problem, budget):
    best = brute_force(problem, budget)
    if best is None:
        with pytest.raises(BudgetError):
            allocate(problem, budget)
        return
    chosen = [options[index] for options, index in zip(problem, allocate(problem, budget), strict=True)]
    assert sum(option.cost for option in chosen) <= budget
    largest = max(option.error for options in problem for option in options)
    assert math.isclose(sum(o.error for o in chosen), best, rel_tol=1e-9, abs_tol=1e-9 * largest)


def test_a_large_problem_is_solved_and_repeatable():
    problem = [
        [Option(4.125, 1 / (1 + group)), Option(8.125, 0.01 / (1 + group)), Option(16.0, 0.0)]
        for group in range(1500)
    ]
    first = allocate(problem, 6 * 1500)
    assert first == allocate(problem, 6 * 1500)
    assert sum(problem[g][i].cost for g, i in enumerate(first)) <= 6 * 1500
    # The group with the larger error never gets fewer bits.
    assert first == sorted(first, reverse=True)


SIZES = {
    layer: [
        {"small": StoredSize(nbytes=100, bits=400, weights=100), "large": StoredSize(200, 0, 0, 800, 100)}
    ]
    * 2
    for layer in (0, 3)
}


def test_bits_are_a_mean_over_all_experts():
    errors = {0: {"small": [1.0, 1.0], "large": [0, 0]}, 3: {"small": [5.0, 0.1], "large": [0, 0]}}
    chosen = choose_schemes(SIZES, errors, Budget(bits=6.0), per_expert=False)
    assert chosen == {0: ["small", "small"], 3: ["large", "large"]}
    assert mean_bits(SIZES, chosen) == 6.0
    chosen = choose_schemes(SIZES, errors, Budget(bits=7.0), per_expert=True)
    assert chosen == {0: ["large", "large"], 3: ["large", "small"]}
    assert mean_bits(SIZES, chosen) == 7.0


def test_impossible_budgets_name_the_smallest():
    errors = {0: {}, 3: {}}
    with pytest.raises(ValueError, match=r"target_bits=3.5 .* smallest possible is 4 bits"):
        choose_schemes(SIZES, errors, Budget(bits=3.5), per_expert=False)
    with pytest.raises(
        ValueError, match=r"target_size=430 .* smallest possible is 450 bytes .* 50 B of it outside"
    ):
        choose_schemes(SIZES, errors, Budget(nbytes=430, rest=50), per_expert=False)
    assert choose_schemes(SIZES, errors, Budget(nbytes=450, rest=50), per_expert=False) == {
        0: ["small", "small"],
        3: ["small", "small"],
    }
