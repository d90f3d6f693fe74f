"""The record of how sparse each expert became, which is also the plan that can be applied again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from llmcompressor_moe.report import ModifierReport, PlanFileError
from llmcompressor_moe.sparsity.pruning import Part

__all__ = ["SparsityReport", "tables_of"]


class SparsityReport(ModifierReport):
    """Report of one ExpertSparsityModifier. Keys and positions are those of the model as it came into the recipe;
    null stands for an expert that was not there any more.

    :param algorithm: sparsegpt or wanda
    :param mask_structure: ``0:0``, or ``N:M``: N of M weights in a row are zero
    :param ratios: block index -> share of each routed expert's weights that shall be zero
    :param shared_ratios: block index -> the same for its shared experts, where they are pruned
    :param zeros: block index -> share that is zero after pruning, per routed expert
    :param shared_zeros: the same for shared experts
    :param mean: share of all routed experts' weights that is zero
    :param tokens: block index -> calibration tokens routed to each expert; null when no statistics were taken
    :param fallback: block index -> experts pruned by magnitude, because no calibration token reached them
    """

    algorithm: str = ""
    mask_structure: str = "0:0"
    ratios: dict[int, list[float | None]]
    shared_ratios: dict[int, float] = Field(default_factory=dict)
    zeros: dict[int, list[float | None]] = Field(default_factory=dict)
    shared_zeros: dict[int, float] = Field(default_factory=dict)
    mean: float | None = None
    tokens: dict[int, list[int | None]] | None = None
    fallback: dict[int, list[int]] = Field(default_factory=dict)

    def check_ratios(
        self, mask_structure: str, allowed: tuple[float, ...] | None, num_experts: dict[int, int]
    ) -> None:
        """Make sure that the ratios, edited by hand perhaps, can be applied.

        :param mask_structure: the modifier's
        :param allowed: the only ratios that this mask structure can give; None: anything from 0 to under 1
        :param num_experts: block index -> experts that the model came with
        :raises PlanFileError: names the entry
        """
        if self.mask_structure != mask_structure:
            raise PlanFileError(
                f"The plan was made with mask_structure={self.mask_structure!r}, the modifier has "
                f"{mask_structure!r}; set mask_structure: {self.mask_structure!r}, or edit the plan."
            )
        for layer, ratios in self.ratios.items():
            count = num_experts.get(layer, 0)
            if len(ratios) != count:
                raise PlanFileError(
                    f"The plan's ratios[{layer}] has {len(ratios)} entries; the layer has {count} experts."
                )
            for expert, ratio in enumerate(ratios):
                _check_ratio(f"ratios[{layer}][{expert}]", ratio, allowed)
        for layer, ratio in self.shared_ratios.items():
            if layer not in num_experts:
                raise PlanFileError(f"The plan's shared_ratios[{layer}]: block {layer} has no MoE layer.")
            _check_ratio(f"shared_ratios[{layer}]", ratio, allowed)

    def describe(self) -> str:
        """One line for the model card."""
        structure = "unstructured" if self.mask_structure == "0:0" else self.mask_structure
        given = [ratio for ratios in self.ratios.values() for ratio in ratios if ratio is not None]
        dense = given.count(0.0)
        spread = f"{min(given):.2f} to {max(given):.2f} per expert" if given else "no expert left"
        if dense and self.mask_structure != "0:0":
            spread = f"{len(given) - dense} of {len(given)} experts"
        by = f"ratios by {self.settings.get('ratios')}" if "sparsity" in self.settings else "ratios of a plan"
        on = f" on {self.calibration['tokens']} tokens" if self.calibration else ""
        shared = ", shared experts too" if self.shared_ratios else ""
        return (
            f"{self.modifier}: {100 * (self.mean or 0.0):.1f} % of the routed experts' weights set to zero by "
            f"{self.algorithm} ({structure}; {spread}{shared}), {by}{on}"
        )


def tables_of(
    parts: Sequence[Part], num_experts: Mapping[int, int], tokens: Mapping[int, Mapping[int, int]] | None
) -> dict[str, Any]:
    """The fields of a report that tell of each expert.

    :param parts: after pruning; those without a ratio are left out
    :param num_experts: block index -> experts that the model came with
    :param tokens: block index -> expert -> tokens routed to it
    """
    pruned = [part for part in parts if part.ratio is not None]
    routed = [part for part in pruned if part.expert is not None]
    shared = [part for part in pruned if part.expert is None]
    weights = sum(part.weights for part in routed)

    def table(values: Mapping[int, Mapping[int, Any]]) -> dict[int, list[Any]]:
        return {
            layer: [by_expert.get(expert) for expert in range(num_experts[layer])]
            for layer, by_expert in values.items()
        }

    ratios: dict[int, dict[int, float]] = {}
    zeros: dict[int, dict[int, float | None]] = {}
    fallback: dict[int, list[int]] = {}
    for part in routed:
        ratios.setdefault(part.layer, {})[part.expert] = part.ratio
        zeros.setdefault(part.layer, {})[part.expert] = part.measured
        if part.fallback:
            fallback.setdefault(part.layer, []).append(part.expert)
    return {
        "ratios": table(ratios),
        "zeros": table(zeros),
        "mean": sum(part.zeros for part in routed) / weights if weights else None,
        "shared_ratios": {part.layer: part.ratio for part in shared},
        "shared_zeros": {part.layer: part.measured for part in shared if part.weights},
        "tokens": None if tokens is None else table(tokens),
        "fallback": fallback,
    }


def _check_ratio(name: str, ratio: float | None, allowed: tuple[float, ...] | None) -> None:
    if ratio is None:
        return
    if allowed is not None and not any(abs(ratio - other) < 1e-9 for other in allowed):
        raise PlanFileError(
            f"The plan's {name} = {ratio} must be one of {', '.join(map(str, allowed))}: with a structure an "
            "expert is pruned as a whole or not at all."
        )
    if not 0 <= ratio < 1:
        raise PlanFileError(f"The plan's {name} = {ratio} must be at least 0 and less than 1.")
