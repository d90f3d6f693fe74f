"""From damages measured at a few counts to how many experts each MoE layer loses, or channels each of its experts.
Pure functions.

A damage is what the model's output loses when one layer alone is cut: mean KL in nats per token.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from llmcompressor_moe.plan import ExpertRoom

__all__ = [
    "allowed_channels",
    "allowed_counts",
    "choose_counts",
    "counts_to_measure",
    "damage_curve",
    "possible_total",
]

# A layer loses at most so many times the mean, where the total can be reached like that.
_MOST = 3


def allowed_counts(room: ExpertRoom, round_to: int | None = None) -> list[int]:
    """How many experts a layer may lose, ascending: whole rounds of its router's groups, down to its floor.

    :param round_to: what is kept is a multiple of this
    """
    return [
        dropped
        for dropped in range(0, max(room.num_experts - room.floor, 0) + 1, room.num_groups)
        if (room.num_experts - dropped) % (round_to or 1) == 0
    ]


def allowed_channels(width: int, step: int) -> list[int]:
    """How many channels the experts of a layer may lose, ascending: none, or what leaves a multiple of ``step``.

    :param width: channels that they have
    """
    widths = range(width - 1 - (width - 1) % step, 0, -step)
    return [0, *(width - kept for kept in widths)]


def counts_to_measure(
    allowed: Mapping[int, Sequence[int]], amounts: Mapping[int, float], total: int
) -> dict[int, list[int]]:
    """At which counts each layer is cut to measure its damage: about half of its even share, the share, twice and
    three times the share, as far as the layer allows; four at most.

    The last is the most that a layer can be chosen to lose. Where three times the share gives no way to the total,
    it is all that the layer allows.

    :param allowed: layer -> see `allowed_counts`, `allowed_channels`
    :param amounts: layer -> its share, were it cut like all others
    :param total: to drop in all
    """
    tops = {
        layer: [count for count in counts if count <= _MOST * amounts[layer]]
        for layer, counts in allowed.items()
    }
    if possible_total(tops, total) != total:
        tops = {layer: list(counts) for layer, counts in allowed.items()}
    return {
        layer: sorted(
            {
                min(counts, key=lambda count, wanted=wanted: (abs(count - wanted), count))
                for wanted in (amounts[layer] / 2, amounts[layer], 2 * amounts[layer], max(counts))
            }
            - {0}
        )
        for layer, counts in tops.items()
        if counts
    }


def damage_curve(measured: Mapping[int, float], counts: Sequence[int]) -> dict[int, float]:
    """Damage at every count up to the largest that was measured.

    Losing nothing costs nothing, and losing more never costs less: what noise makes decreasing is pooled
    (isotonic regression). In between the curve is monotone and smooth (PCHIP: Fritsch and Butland, 1984), convex
    or not.

    :param measured: count -> nats
    :param counts: those wanted
    """
    known = sorted({0: 0.0, **measured}.items())
    xs, ys = [count for count, _ in known], [nats for _, nats in known]
    if len(xs) == 1:
        return {count: 0.0 for count in counts if count == 0}
    # The first value is exact.
    ys = [0.0, *isotonic_regression(ys[1:]).x]
    curve = PchipInterpolator(xs, ys)
    return {count: float(curve(count)) for count in counts if count <= xs[-1]}


def choose_counts(damages: Mapping[int, Mapping[int, float]], total: int) -> dict[int, int]:
    """The count of each layer with which the sum of damages is least, exactly: a multiple-choice knapsack, by
    dynamic programming over the total.

    :param damages: layer -> count -> nats
    :param total: to drop in all
    :return: layer -> count; of equally good choices the one where the first layers lose least
    :raises ValueError: no choice of counts gives this total
    """
    layers = sorted(damages)
    # Channels go in steps: that many counts are one.
    unit = math.gcd(total, *(count for counts in damages.values() for count in counts)) or 1
    if unit > 1:
        fewer = {
            layer: {count // unit: nats for count, nats in counts.items()}
            for layer, counts in damages.items()
        }
        return {layer: count * unit for layer, count in choose_counts(fewer, total // unit).items()}
    # Last layer first: best[i][t] is the least that layers i and later can lose for t.
    best = [np.full(total + 1, np.inf) for _ in range(len(layers) + 1)]
    best[-1][0] = 0.0
    for position in reversed(range(len(layers))):
        for count, nats in damages[layers[position]].items():
            if count <= total:
                reached = best[position + 1][: total + 1 - count] + nats
                np.minimum(best[position][count:], reached, out=best[position][count:])
    if not np.isfinite(best[0][total]):
        raise ValueError(f"no choice of counts drops {total} in all.")
    chosen, left = {}, total
    for position, layer in enumerate(layers):
        options = damages[layer]
        chosen[layer] = next(
            count
            for count in sorted(options)
            if count <= left and best[position + 1][left - count] + options[count] == best[position][left]
        )
        left -= chosen[layer]
    return chosen


def possible_total(allowed: Mapping[int, Sequence[int]], wanted: int) -> int | None:
    """The most that can be dropped in all, up to ``wanted``; None where no number up to it is possible."""
    # Bit t: a total of t is possible.
    totals = 1
    for counts in allowed.values():
        totals = functools.reduce(operator.or_, (totals << count for count in counts), 0)
    found = (totals & ((1 << (wanted + 1)) - 1)).bit_length() - 1
    return None if found < 0 else found
