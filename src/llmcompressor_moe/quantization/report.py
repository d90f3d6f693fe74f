"""The record of one router-aware quantization: what was measured, what was chosen, what it did. Also the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llmcompressor_moe.report import ModifierReport
from llmcompressor_moe.routing.fidelity import RoutingFidelity

__all__ = ["LayerPlan", "QuantReport"]


class LayerPlan(BaseModel):
    """One MoE layer. Errors are E over tokens of sum over its experts of ||g (f(x) - f_q(x))||^2.

    :param scheme: the scheme of all experts, or one per expert (original expert index -> scheme)
    :param bits: bits per routed-expert weight, scales and zero points counted
    :param nbytes: bytes of the routed experts on disk
    :param candidates: scheme -> expected error of the whole layer
    :param predicted_error: expected error of what was chosen
    :param predicted_relative_error: the same over the power of the layer's output
    :param measured_error: what it came to on held-out data, after the algorithm
    :param starved_experts: original indices of experts with too few tokens to be judged by their own
    """

    model_config = ConfigDict(extra="forbid")

    scheme: str | dict[int, str]
    bits: float | None = None
    nbytes: int | None = None
    candidates: dict[str, float] = {}
    predicted_error: float | None = None
    predicted_relative_error: float | None = None
    measured_error: float | None = None
    measured_relative_error: float | None = None
    routing: RoutingFidelity | None = None
    routed_tokens: list[int] = []
    starved_experts: list[int] = []


class QuantReport(ModifierReport):
    """Report of a RouterAwareQuantModifier. Indices are those of the model as it came into the recipe.

    :param schemes: every scheme that a layer names, as compressed-tensors writes it; null for 16 bit
    :param layers: block index -> what was chosen; edit ``scheme`` and give the file back as ``plan_path``
    :param mean_bits: bits per routed-expert weight over all layers
    :param nbytes: bytes of all weight files that the plan promises
    :param router_change: share of routing decisions that quantized routers alone would change
    :param held_out: whether the measured figures come from batches that nothing was decided on (rtn: never
        seen at all; gptq and awq calibrate weights on all data)
    :param algorithm_notes: what the algorithm could not do, with counts
    """

    schemes: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    layers: dict[int, LayerPlan] = Field(default_factory=dict)
    mean_bits: float | None = None
    nbytes: int | None = None
    router_change: float | None = None
    held_out: bool | None = None
    algorithm_notes: list[str] = Field(default_factory=list)

    def judge(
        self,
        routing: Mapping[int, RoutingFidelity],
        errors: Mapping[int, float],
        powers: Mapping[int, float],
        *,
        apart: bool,
        comparable: bool,
    ) -> None:
        """Note what quantization came to.

        :param comparable: whether the experts still take the inputs they took before (AWQ moves scales from
            the norms into them)
        """
        self.held_out = apart
        for layer, plan in self.layers.items():
            plan.routing = routing.get(layer)
            if comparable and layer in errors:
                plan.measured_error = errors[layer]
                plan.measured_relative_error = errors[layer] / powers[layer] if powers[layer] else None

    def describe(self) -> str:
        """One line for the model card."""
        names = [
            name
            for layer in self.layers.values()
            for name in ([layer.scheme] if isinstance(layer.scheme, str) else layer.scheme.values())
        ]
        counts = ", ".join(f"{names.count(name)} in {name}" for name in dict.fromkeys(names))
        what = (
            "MoE layers"
            if all(isinstance(layer.scheme, str) for layer in self.layers.values())
            else "experts"
        )
        bits = f", {self.mean_bits:.2f} bits per expert weight" if self.mean_bits is not None else ""
        how = self.settings.get("algorithm", "rtn")
        by = self.settings.get("sensitivity", "a plan")
        return f"{self.modifier}: {what}: {counts}{bits} ({how}, chosen by {by})"
