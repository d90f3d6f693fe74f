"""One ratio per expert, or a choice of experts, that keeps a given mean over all weights."""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Sequence

__all__ = ["STEEPNESS", "experts_to_prune", "ratio_of_structure", "ratios_for_mean"]

# By how much ln(damage) grows per unit of ratio. On the demo model it is about 10 between ratios of 0.3 and 0.8
# (docs/sparsity.md). More than that is better, because the importance of an expert is known with an error and
# small differences mean little: of 10, 14, 20 and 30 this one did best over means of 0.5 and 0.7.
STEEPNESS = 14.0

# What an importance of zero counts as, relative to the largest: enough to be at the bound before all others.
_NOTHING = 1e-12


def ratios_for_mean(
    importance: Sequence[float],
    sizes: Sequence[int],
    mean: float,
    low: float,
    high: float,
    steepness: float = STEEPNESS,
) -> list[float]:
    """The ratios that do the least damage at a given mean, when an expert's damage is
    ``importance * exp(steepness * ratio)`` per weight.

    Setting the derivatives equal gives ``ratio = level - ln(importance) / steepness`` within the bounds: an expert
    that matters e times as much keeps ``1 / steepness`` more of its weights. The level that meets the mean is
    found exactly, on the pieces between the points where an expert reaches a bound (water-filling).

    :param importance: one number per expert, not negative; more important experts never get a higher ratio
    :param sizes: weights of each expert
    :param mean: ratio over all weights, between the bounds
    :param low: smallest ratio of any expert
    :param high: largest
    :return: one ratio per expert
    :raises ValueError: the bounds do not hold the mean, or an importance is negative or not finite
    """
    if not 0 <= low <= mean <= high <= 1:
        raise ValueError(f"The bounds {low} and {high} must lie in 0 to 1 with the mean {mean} between them.")
    if any(not math.isfinite(value) or value < 0 for value in importance):
        raise ValueError(f"importance={list(importance)} must be finite and not negative.")
    if not importance:
        return []
    least = _NOTHING * max(importance) or 1.0
    offsets = [-math.log(max(value, least)) / steepness for value in importance]
    if len(set(offsets)) == 1:
        return [mean] * len(offsets)

    def at(level: float) -> list[float]:
        return [min(high, max(low, level + offset)) for offset in offsets]

    def total(level: float) -> float:
        return math.fsum(size * ratio for size, ratio in zip(sizes, at(level), strict=True))

    wanted = mean * sum(sizes)
    marks = sorted({bound - offset for offset in offsets for bound in (low, high)})
    above = min(bisect.bisect_left(marks, wanted, key=total), len(marks) - 1)
    if above == 0:
        return at(marks[0])
    below, reached = total(marks[above - 1]), total(marks[above])
    share = (wanted - below) / (reached - below) if reached > below else 1.0
    return at(marks[above - 1] + min(1.0, max(0.0, share)) * (marks[above] - marks[above - 1]))


def experts_to_prune(importance: Sequence[float], sizes: Sequence[int], wanted: float) -> list[int]:
    """Whole experts whose sizes sum up to ``wanted`` as nearly as possible, the least important ones.

    Among the choices that come equally near, the one with the smallest sum of importance is taken; it is exact.
    Experts of one size are exchangeable, so only how many of each size go has to be searched.

    :param importance: one number per expert
    :param sizes: weights of each expert
    :param wanted: weights that shall be in the chosen experts
    :return: positions of the chosen experts, ascending
    """
    by_size: dict[int, list[int]] = {}
    for position in sorted(range(len(sizes)), key=lambda p: (importance[p], p)):
        by_size.setdefault(sizes[position], []).append(position)
    # weights chosen -> (importance chosen, experts chosen per size)
    reachable: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for size, positions in by_size.items():
        costs = [0.0, *itertools.accumulate(importance[p] for p in positions)]
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for weights, (cost, counts) in reachable.items():
            for count, more in enumerate(costs):
                option = (cost + more, (*counts, count))
                total = weights + count * size
                if total not in grown or option < grown[total]:
                    grown[total] = option
        reachable = grown
    nearest = min(reachable, key=lambda weights: (abs(weights - wanted), reachable[weights]))
    counts = reachable[nearest][1]
    chosen = [positions[:count] for positions, count in zip(by_size.values(), counts, strict=True)]
    return sorted(position for group in chosen for position in group)


def ratio_of_structure(mask_structure: str) -> float | None:
    """The share of zeros that a mask structure gives: N/M for ``N:M``, None for ``0:0``, which gives any.

    :raises ValueError: it is neither
    """
    match = re.fullmatch(r"(\d+):(\d+)", mask_structure)
    n, m = map(int, match.groups()) if match else (1, 0)
    if (n, m) == (0, 0):
        return None
    if not 0 < n < m:
        raise ValueError(
            f"mask_structure={mask_structure!r} must be '0:0' (unstructured) or 'N:M' with N under M, such as "
            "'2:4': N of M consecutive weights become zero."
        )
    return n / m
