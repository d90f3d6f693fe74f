"""From a model and calibration data to a plan: which Linears, what each candidate costs, what is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from llmcompressor_moe.checkpoint.quantized_names import patterns_for
from llmcompressor_moe.profile.forward import sum_over_ranks
from llmcompressor_moe.profile.samples import LayerSample, collect_samples, empty_sample
from llmcompressor_moe.quantization.footprint import expert_sizes, rest_size
from llmcompressor_moe.quantization.measure import LayerMeasurement, measure_candidates, measure_layer
from llmcompressor_moe.quantization.planning import Budget, choose_schemes, mean_bits
from llmcompressor_moe.quantization.report import LayerPlan, QuantReport
from llmcompressor_moe.quantization.schemes import UNQUANTIZED, Candidate
from llmcompressor_moe.quantization.sensitivity import SensitivityInput, output_error, sensitivity, starved
from llmcompressor_moe.quantization.sizes import StoredSize
from llmcompressor_moe.quantization.targets import (
    attention_linears,
    dense_linears,
    expert_linears,
    without_ignored,
)
from llmcompressor_moe.report import PlanFileError
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["Planner", "QuantSettings"]

# layer -> expert -> module path -> Linear
Experts = dict[int, list[dict[str, nn.Linear]]]
Sizes = dict[int, list[dict[str, StoredSize]]]


@dataclass(frozen=True)
class QuantSettings:
    """What a recipe asks for.

    :param candidates: schemes to choose from for routed experts
    :param attention: scheme of attention's Linears, None: 16 bit
    :param dense: scheme of shared experts and dense feed-forward layers
    :param per_expert: one scheme per expert instead of one per layer
    """

    candidates: Sequence[Candidate]
    attention: Candidate | None
    dense: Candidate | None
    target_bits: float | None
    target_size: int | None
    per_expert: bool
    ignore: Sequence[str]
    sensitivity: str
    sample_tokens: int
    seed: int


@dataclass
class Planner:
    """The model as it is now, and what is asked for it.

    :param session: the model with everything that the recipe has cut so far
    """

    session: TrimSession
    settings: QuantSettings
    experts: Experts = field(init=False)

    def __post_init__(self) -> None:
        self.experts = {}
        for layer in self.session.layers:
            linears = expert_linears(self.session, layer)
            kept = [without_ignored(expert, self.settings.ignore) for expert in linears]
            if not any(kept):
                continue
            if sum(map(len, kept)) != sum(map(len, linears)):
                raise ValueError(
                    f"ignore={list(self.settings.ignore)} leaves out some experts of block {layer} and not "
                    "others; vLLM runs a layer's experts as one. Ignore all of them "
                    rf"(for example 're:.*layers\.{layer}\..*experts.*') or none."
                )
            self.experts[layer] = linears
        if not self.experts:
            raise ValueError(
                f"ignore={list(self.settings.ignore)} and the drops before leave no routed expert to quantize; "
                "ignore fewer, drop fewer MoE layers, or use llm-compressor's QuantizationModifier for the rest."
            )

    @property
    def fixed(self) -> dict[str, tuple[Candidate, dict[str, nn.Linear]]]:
        """Field -> its scheme and the Linears that get it."""
        found = {}
        for name, candidate, linears in (
            ("attention_scheme", self.settings.attention, attention_linears),
            ("dense_scheme", self.settings.dense, dense_linears),
        ):
            if candidate is not None and candidate.scheme is not None:
                found[name] = (candidate, without_ignored(linears(self.session), self.settings.ignore))
        return found

    @property
    def names(self) -> list[str]:
        """Paths of all modules that may get a scheme."""
        routed = [name for layer in self.experts.values() for expert in layer for name in expert]
        return routed + [name for _, linears in self.fixed.values() for name in linears]

    @property
    def first_experts(self) -> list[str]:
        """Paths of the Linears of one expert in each layer; those of others differ in the number."""
        return [name for layer in self.experts.values() for name in layer[0]]

    @property
    def _digits(self) -> int:
        """Digits of the largest offset in a weight file: no file is larger than the plain model."""
        with disable_onloading():
            return len(str(sum(p.numel() * p.element_size() for p in self.session.model.parameters())))

    def sizes(self) -> Sizes:
        """What each expert would take under each candidate."""
        return {
            layer: expert_sizes(self.session, experts, self.settings.candidates)
            for layer, experts in self.experts.items()
        }

    def rest(self) -> int:
        """Bytes of everything but the routed experts that are chosen for."""
        fixed = {name: candidate.scheme for candidate, linears in self.fixed.values() for name in linears}
        covered = [name for layer in self.experts.values() for expert in layer for name in expert]
        return rest_size(self.session, fixed, covered).on_disk(self._digits)

    def check_budget(self, shrinks: bool) -> None:
        """Refuse an impossible budget without having measured anything.

        :param shrinks: whether modifiers before this one may still take layers or experts away
        :raises ValueError: names the smallest possible budget
        """
        sizes = self.sizes()
        if shrinks and self.settings.target_bits is None:
            return
        if shrinks:
            # Whatever goes, the mean stays at or above that of the layer that takes the fewest bits.
            least = {
                layer: min(mean_bits(sizes, {layer: [name] * len(experts)}) for name in experts[0])
                for layer, experts in sizes.items()
            }
            layer = min(least, key=least.get)
            sizes = {layer: sizes[layer]}
        choose_schemes(sizes, {layer: {} for layer in sizes}, self.budget(), per_expert=False)

    def check_plan(self, saved: QuantReport, shrinks: bool) -> None:
        """Refuse a saved plan that does not fit; see `apply`.

        :param shrinks: whether modifiers before this one may still take away what the plan is silent about
        """
        self._planned(saved, shrinks)

    def plan(self, batches: Sequence[dict[str, Any]], skip_layers: set[int]) -> dict[str, Any]:
        """Measure and choose: the fields of a `QuantReport` that say what was decided and why.

        :param batches: calibration data to decide on; may be empty where the sensitivity needs none
        :param skip_layers: MoE layers that do not run any more
        """
        measurements = self.measure(batches, skip_layers)
        for layer, measurement in measurements.items():
            _check_finite(layer, measurement)
        sizes = self.sizes()
        errors, expected = {}, {}
        for layer, measurement in measurements.items():
            bits = {name: size.bits / size.weights for name, size in sizes[layer][0].items()}
            given = SensitivityInput(measurement, bits, layer, self.settings.seed)
            errors[layer] = sensitivity(self.settings.sensitivity).errors(given)
            expected[layer] = output_error(given)
        chosen = choose_schemes(sizes, errors, self.budget(), per_expert=self.settings.per_expert)
        layers = {
            layer: self._layer_plan(
                layer, names, sizes[layer], errors[layer], expected[layer], measurements[layer]
            )
            for layer, names in chosen.items()
        }
        return self._totals(layers, sizes, chosen) | {
            "calibration": {
                "tokens": max((m.tokens for m in measurements.values()), default=0),
                "samples": int(
                    sum_over_ranks(torch.tensor(float(sum(len(b["input_ids"]) for b in batches))))
                ),
            }
            if batches
            else None
        }

    def apply(self, saved: QuantReport) -> dict[str, Any]:
        """The same from a saved plan.

        :raises PlanFileError: it does not name a scheme for every expert, or one that it does not define
        """
        sizes = self.sizes()
        chosen = self._planned(saved, shrinks=False)
        layers = {
            layer: LayerPlan(**self._chosen_fields(layer, names, sizes[layer]))
            for layer, names in chosen.items()
        }
        return self._totals(layers, sizes, chosen) | {"calibration": saved.calibration}

    def groups(self, report: QuantReport) -> dict[str, QuantizationScheme]:
        """compressed-tensors groups with targets for upstream's modifiers, as few patterns as possible."""
        members: dict[str, list[str]] = {}
        schemes = {candidate.name: candidate for candidate in self.settings.candidates}
        for layer, experts in self.experts.items():
            scheme = report.layers[layer].scheme
            for identity, linears in zip(self.session.expert_ids(layer), experts, strict=True):
                name = scheme if isinstance(scheme, str) else scheme[identity]
                members.setdefault(name, []).extend(linears)
        linears = [
            name for name, module in self.session.model.named_modules() if isinstance(module, nn.Linear)
        ]
        stacks = [self.session.topology.stack]
        groups = {
            # Prefixed: a recipe may name its scheme like a field.
            f"schemes.{name}": schemes[name].for_targets(patterns_for(paths, linears, stacks))
            for name, paths in members.items()
            if schemes[name].scheme is not None
        }
        for field_name, (candidate, covered) in self.fixed.items():
            if covered:
                groups[field_name] = candidate.for_targets(patterns_for(covered, linears, stacks))
        return groups

    def budget(self) -> Budget:
        """What may be spent on routed experts."""
        if self.settings.target_bits is not None:
            return Budget(bits=self.settings.target_bits)
        return Budget(nbytes=self.settings.target_size, rest=self.rest(), digits=self._digits)

    def measure(
        self, batches: Sequence[dict[str, Any]], skip_layers: set[int]
    ) -> dict[int, LayerMeasurement]:
        """Try every candidate on every expert.

        :param batches: see `plan`
        """
        session = self.session
        modules = {layer: session.experts(layer) for layer in self.experts}
        if not batches:
            samples = {layer: empty_sample(len(experts)) for layer, experts in modules.items()}
            return measure_candidates(modules, samples, self.settings.candidates)
        found: dict[int, LayerMeasurement] = {}

        def measure(layer: int, sample: LayerSample) -> None:
            found[layer] = measure_layer(modules[layer], sample, self.settings.candidates)

        # Each layer as soon as its sample is there: the samples of all layers together may not fit in memory.
        collect_samples(
            session.model,
            session.topology_now(),
            batches,
            self.settings.sample_tokens,
            skip_layers=skip_layers | (session.topology.moe_layers.keys() - modules.keys()),
            on_layer_done=measure,
        )
        return found

    def _planned(self, saved: QuantReport, shrinks: bool) -> dict[int, list[str]]:
        """Layer -> scheme per expert, as a saved plan has it."""
        known = {candidate.name for candidate in self.settings.candidates}
        layers = self.session.topology.moe_layers
        unknown = sorted(set(saved.layers) - set(layers))
        if unknown:
            raise PlanFileError(
                f"The plan names blocks {unknown}; MoE layers are in blocks {sorted(layers)}."
            )
        chosen: dict[int, list[str]] = {}
        for layer in self.experts:
            plan = saved.layers.get(layer)
            if plan is None:
                if shrinks:
                    continue
                raise PlanFileError(f"The plan names no scheme for the MoE layer of block {layer}.")
            ids = self.session.expert_ids(layer)
            given = dict.fromkeys(ids, plan.scheme) if isinstance(plan.scheme, str) else plan.scheme
            unknown = sorted(set(given) - set(range(layers[layer].num_experts)))
            if unknown:
                raise PlanFileError(
                    f"The plan names experts {unknown} of block {layer}, which has {layers[layer].num_experts}."
                )
            missing = [expert for expert in ids if expert not in given]
            if missing and not shrinks:
                raise PlanFileError(f"The plan names no scheme for experts {missing} of block {layer}.")
            chosen[layer] = [given[expert] for expert in ids if expert in given]
            undefined = sorted(set(chosen[layer]) - known)
            if undefined:
                raise PlanFileError(
                    f"The plan gives block {layer} the scheme {undefined[0]!r}, which its schemes "
                    f"({', '.join(sorted(known))}) do not define."
                )
            if not self.settings.per_expert and len(set(chosen[layer])) > 1:
                raise PlanFileError(
                    f"The plan gives experts of block {layer} different schemes, {sorted(set(chosen[layer]))}; "
                    "vLLM serves one per layer. Set granularity='expert' for research."
                )
        return chosen

    def _layer_plan(
        self,
        layer: int,
        names: Sequence[str],
        sizes: Sequence[Mapping[str, StoredSize]],
        errors: Mapping[str, Sequence[float]],
        expected: Mapping[str, Sequence[float]],
        measurement: LayerMeasurement,
    ) -> LayerPlan:
        ids = self.session.expert_ids(layer)
        predicted = sum(expected[name][i] for i, name in enumerate(names) if name in expected)
        seen = measurement.tokens > 0
        return LayerPlan(
            **self._chosen_fields(layer, names, sizes),
            candidates={name: sum(errors.get(name, ())) for name in sizes[0]},
            predicted_error=predicted if seen else None,
            predicted_relative_error=predicted / measurement.output_power
            if measurement.output_power
            else None,
            routed_tokens=measurement.routed_tokens,
            starved_experts=[ids[index] for index in starved(measurement)] if seen else [],
        )

    def _chosen_fields(
        self, layer: int, names: Sequence[str], sizes: Sequence[Mapping[str, StoredSize]]
    ) -> dict[str, Any]:
        total = sum((size[name] for size, name in zip(sizes, names, strict=True)), StoredSize())
        ids = self.session.expert_ids(layer)
        return {
            "scheme": dict(zip(ids, names, strict=True)) if self.settings.per_expert else names[0],
            "bits": total.bits / total.weights,
            "nbytes": total.on_disk(self._digits),
        }

    def _totals(
        self, layers: dict[int, LayerPlan], sizes: Sizes, chosen: Mapping[int, Sequence[str]]
    ) -> dict[str, Any]:
        used = {name for names in chosen.values() for name in names}
        return {
            "layers": layers,
            "mean_bits": mean_bits(sizes, chosen),
            "nbytes": self.rest() + sum(plan.nbytes for plan in layers.values()),
            "schemes": {
                candidate.name: candidate.scheme.model_dump(
                    mode="json", exclude={"targets"}, exclude_none=True
                )
                if candidate.scheme is not None
                else None
                for candidate in self.settings.candidates
                if candidate.name in used or candidate.name == UNQUANTIZED
            },
        }


def _check_finite(layer: int, measurement: LayerMeasurement) -> None:
    for name, errors in measurement.weight_error.items():
        values = [*errors, *measurement.sampled_error[name]]
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(
                f"Rounding the experts of block {layer} to {name} gave NaN or infinite errors: their weights or "
                "their inputs are. Nothing was quantized. Check the weights and the dtype (a model in float16 "
                "often overflows: load it in bfloat16)."
            )
