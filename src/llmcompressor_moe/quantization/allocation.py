"""Spend a budget: one choice per group so that the sum of errors is smallest. Exact."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

__all__ = ["BudgetError", "Option", "allocate"]

# The solver's absolute tolerance is fixed; the objective is scaled so that it means nothing.
_OBJECTIVE_SCALE = 1e4
# The solver takes a constraint for kept that is broken by this much.
_TOLERANCE = 1e-6


class BudgetError(ValueError):
    """No choice fits the budget."""


@dataclass(frozen=True)
class Option:
    """One choice for one group.

    :param cost: what it takes from the budget, at least 0
    :param error: what it adds to the error, at least 0
    """

    cost: float
    error: float


def allocate(groups: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """Index of the chosen option per group: costs within ``budget``, the sum of errors as small as possible.

    A multiple-choice knapsack, solved as a mixed integer program by HiGHS to a zero gap. Differences below 1e-9
    of the largest error count as none. The budget is never exceeded; where the solver's tolerance would have
    exceeded it, choices within a millionth of it may be passed over.

    :raises BudgetError: even the cheapest options cost more
    """
    if not groups:
        return []
    cheapest = sum(min(option.cost for option in options) for options in groups)
    if cheapest > budget:
        raise BudgetError(f"budget {budget} is under the cheapest choice, {cheapest}")
    useful = [_undominated(options) for options in groups]
    costs = np.array([groups[g][i].cost for g, kept in enumerate(useful) for i in kept], dtype=float)
    errors = np.array([groups[g][i].error for g, kept in enumerate(useful) for i in kept], dtype=float)
    sizes = [len(kept) for kept in useful]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    owner = np.repeat(np.arange(len(groups)), sizes)
    once = csr_array((np.ones(len(costs)), (owner, np.arange(len(costs)))), shape=(len(groups), len(costs)))
    # Only what an option adds to its group's smallest error can be chosen, and only that is scaled.
    extra = errors - np.minimum.reduceat(errors, starts[:-1])[owner]
    unit = max(budget, 1.0)
    limit = csr_array(costs[None] / unit)
    relaxed = linprog(
        _scaled(extra, extra.max()), A_ub=limit, b_ub=[budget / unit], A_eq=once, b_eq=np.ones(len(groups))
    )
    optimum = relaxed.fun * extra.max() / _OBJECTIVE_SCALE if relaxed.success else 0.0
    minimised = _scaled(extra, optimum if optimum > 0 else extra.max())
    slack = 0.0
    while True:
        result = milp(
            minimised,
            integrality=np.ones(len(costs)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(once, 1, 1),
                LinearConstraint(limit, -np.inf, (budget - slack) / unit),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            break
        best = [int(np.argmax(result.x[start:end])) for start, end in itertools.pairwise(starts)]
        chosen = [kept[index] for kept, index in zip(useful, best, strict=True)]
        if sum(options[i].cost for options, i in zip(groups, chosen, strict=True)) <= budget:
            return chosen
        slack = max(2 * slack, _TOLERANCE * unit)
    if not slack:
        raise BudgetError(f"the solver found no choice within {budget}: {result.message}")
    # Nothing but the cheapest choice lies further under the budget than the solver's tolerance.
    return [kept[0] for kept in useful]


def _undominated(options: Sequence[Option]) -> list[int]:
    """Options that no other beats in cost and error at once; of equals the first."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].error, i)):
        if not kept or options[index].error < options[kept[-1]].error:
            kept.append(index)
    return kept


def _scaled(errors: np.ndarray, by: float) -> np.ndarray:
    return errors * (_OBJECTIVE_SCALE / by) if by > 0 else errors
