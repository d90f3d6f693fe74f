"""From sizes and expected errors to one scheme per MoE layer, or per expert. No model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmcompressor_moe.quantization.allocation import BudgetError, Option, allocate
from llmcompressor_moe.quantization.sizes import StoredSize
from llmcompressor_moe.sizes import bytes_text

__all__ = ["Budget", "choose_schemes", "mean_bits"]

# layer -> expert -> candidate -> size
Sizes = Mapping[int, Sequence[Mapping[str, StoredSize]]]
# layer -> candidate -> error per expert; missing candidates change nothing
Errors = Mapping[int, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Budget:
    """What may be spent.

    :param bits: mean bits per routed-expert weight
    :param nbytes: bytes of all weight files
    :param rest: bytes of everything that is not a routed expert under one of the candidates
    :param digits: digits of the largest offset in a weight file
    """

    bits: float | None = None
    nbytes: int | None = None
    rest: int = 0
    digits: int = 12


def choose_schemes(sizes: Sizes, errors: Errors, budget: Budget, *, per_expert: bool) -> dict[int, list[str]]:
    """The candidates that cost the least error within the budget.

    :return: layer -> candidate per expert
    :raises ValueError: the budget is impossible; names the smallest possible one
    """
    units = [
        (layer, members)
        for layer, experts in sizes.items()
        for members in ([[i] for i in range(len(experts))] if per_expert else [list(range(len(experts)))])
    ]
    names = [list(sizes[layer][members[0]]) for layer, members in units]
    groups = [
        [
            Option(
                cost=_cost([sizes[layer][i][name] for i in members], budget),
                error=sum(errors[layer][name][i] for i in members) if name in errors[layer] else 0.0,
            )
            for name in candidates
        ]
        for (layer, members), candidates in zip(units, names, strict=True)
    ]
    limit, smallest = _limits(groups, sizes, budget)
    try:
        chosen = allocate(groups, limit)
    except BudgetError as error:
        raise ValueError(smallest) from error
    result: dict[int, list[str]] = {layer: [""] * len(experts) for layer, experts in sizes.items()}
    for (layer, members), candidates, choice in zip(units, names, chosen, strict=True):
        for i in members:
            result[layer][i] = candidates[choice]
    return result


def _cost(sizes: Sequence[StoredSize], budget: Budget) -> float:
    return sum(size.bits if budget.bits is not None else size.on_disk(budget.digits) for size in sizes)


def _limits(groups: list[list[Option]], sizes: Sizes, budget: Budget) -> tuple[float, str]:
    """What the solver may spend, and what to say if it cannot."""
    cheapest = sum(min(option.cost for option in options) for options in groups)
    if budget.bits is not None:
        weights = sum(next(iter(expert.values())).weights for layer in sizes.values() for expert in layer)
        # Rounded up, so that what the message names is possible; the margin is for decimals that no float holds.
        smallest_bits = math.ceil(round(cheapest / weights * 1e4, 6)) / 1e4
        return budget.bits * weights * (1 + 1e-12), (
            f"target_bits={budget.bits} is impossible with these schemes: the smallest possible is "
            f"{smallest_bits:g} bits per expert weight, scales counted. Raise target_bits or add a "
            "smaller scheme."
        )
    smallest = int(cheapest) + budget.rest
    return float(budget.nbytes - budget.rest), (
        f"target_size={budget.nbytes} ({bytes_text(budget.nbytes)}) is impossible with these schemes: the "
        f"smallest possible is {smallest} bytes ({bytes_text(smallest)}), {bytes_text(budget.rest)} of it outside "
        "the routed experts. Raise target_size, add a smaller scheme, quantize the rest (attention_scheme, "
        "dense_scheme), or drop parts first."
    )


def mean_bits(sizes: Sizes, chosen: Mapping[int, Sequence[str]]) -> float:
    """Bits per routed-expert weight of a choice, scales and zero points counted."""
    total = StoredSize()
    for layer, names in chosen.items():
        for expert, name in zip(sizes[layer], names, strict=True):
            total += expert[name]
    return total.bits / total.weights
