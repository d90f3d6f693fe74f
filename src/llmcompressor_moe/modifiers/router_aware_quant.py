"""Router-aware mixed-precision quantization of experts, by upstream's algorithms."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.utils import match_name
from llmcompressor.core import Event, State
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from llmcompressor_moe.compat.llmcompressor.mappings import awq_mappings
from llmcompressor_moe.compat.llmcompressor.pinning import pin_only_with_an_accelerator
from llmcompressor_moe.compat.llmcompressor.wrong_mappings import wrong_mappings
from llmcompressor_moe.modifiers.base import MoEModifier, modifiers_before, recipe_modifiers
from llmcompressor_moe.profile.splitting import split_held_out
from llmcompressor_moe.quantization import algorithms, heldout, refusals
from llmcompressor_moe.quantization.planner import Planner, QuantSettings
from llmcompressor_moe.quantization.report import QuantReport
from llmcompressor_moe.quantization.routers import check_routers, guard_routers
from llmcompressor_moe.quantization.schemes import (
    UNQUANTIZED,
    Candidate,
    SchemeSpec,
    needs_static_inputs,
    resolve_scheme,
    resolve_schemes,
)
from llmcompressor_moe.quantization.sensitivity import sensitivity
from llmcompressor_moe.report import PlanFileError
from llmcompressor_moe.sizes import parse_bytes

__all__ = ["RouterAwareQuantModifier"]


class RouterAwareQuantModifier(MoEModifier):
    """Gives each MoE layer the precision that its routed output needs, within a budget, and quantizes it with
    upstream's round-to-nearest, GPTQ or AWQ.

    Each candidate scheme is really applied to each expert and compared on the tokens that the router sends it;
    the choice with the smallest sum of router-weighted errors that fits the budget is taken, exactly. Takes
    exactly one of ``target_bits``, ``target_size`` and ``plan_path``.

    Sample YAML::

        RouterAwareQuantModifier:
          schemes: [W4A16, W8A16]
          target_bits: 5.0
          algorithm: gptq
          attention_scheme: W8A16
          report_path: precision.json

    Lifecycle:
        - on_initialize: look at the model, refuse what cannot work
        - on_calibration_start: measure on all but the last eighth of the data, choose, attach schemes
        - on_sequential_epoch_end: upstream's algorithm quantizes
        - on_calibration_end: compare routers and outputs on held-out data; write the report
        - on_finalize: complete the model like all modifiers of this package

    :param schemes: candidates: presets of compressed-tensors, ``UNQUANTIZED`` for 16 bit, or
        ``{name: {weights: ..., input_activations: ...}}``
    :param group_size: replaces the group size of all group-wise integer schemes
    :param target_bits: mean bits per routed-expert weight, scales and zero points counted
    :param target_size: bytes of all weight files, or a text such as ``20GiB``
    :param granularity: ``layer`` or ``expert`` (research: vLLM cannot serve layers with several schemes)
    :param algorithm: ``rtn``, ``gptq`` or ``awq``
    :param attention_scheme: scheme of all Linears of attention; None leaves them in 16 bit
    :param dense_scheme: the same for shared experts and dense feed-forward layers
    :param kv_cache_scheme: how keys and values are quantized, in the fields of compressed-tensors'
        ``QuantizationArgs``; None leaves them in 16 bit
    :param ignore: names or ``re:`` patterns that stay in 16 bit; routers always do unless ``router`` is set
    :param router: scheme on whose grid the routers are rounded; they stay stored in 16 bit
    :param max_routing_change: largest share of routing decisions that rounding the routers may change
    :param sensitivity: output_error, frequency, weight_error, uniform or random
    :param sample_tokens: tokens per expert on which candidates are tried
    :param servable: False allows schemes that vLLM cannot serve
    """

    schemes: list[SchemeSpec] = Field(default_factory=lambda: ["W4A16", "W8A16"])
    group_size: int | None = Field(default=None, ge=1)
    target_bits: float | None = None
    target_size: int | str | None = None
    granularity: Literal["layer", "expert"] = "layer"
    algorithm: Literal["rtn", "gptq", "awq"] = "rtn"
    attention_scheme: SchemeSpec | None = None
    dense_scheme: SchemeSpec | None = None
    kv_cache_scheme: QuantizationArgs | None = None
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])
    router: SchemeSpec | None = None
    max_routing_change: float = Field(default=0.02, ge=0, le=1)
    sensitivity: str = "output_error"
    sample_tokens: int = Field(default=256, ge=1)
    servable: bool = True

    _asked: QuantSettings | None = PrivateAttr(default=None)
    _router_scheme: Candidate | None = PrivateAttr(default=None)
    _plan: QuantReport | None = PrivateAttr(default=None)
    _report: QuantReport | None = PrivateAttr(default=None)
    _reference: heldout.Reference | None = PrivateAttr(default=None)
    _upstream: algorithms.UpstreamQuantization | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_fields(self) -> RouterAwareQuantModifier:
        self._check_one_of(("target_bits", "target_size", "plan_path"))
        if self.target_bits is not None and not 0 < self.target_bits <= 32:
            raise ValueError(f"target_bits={self.target_bits} must lie between 0 and 32.")
        sensitivity(self.sensitivity)
        self._asked = QuantSettings(
            candidates=resolve_schemes(self.schemes, self.group_size, "schemes"),
            attention=self._one("attention_scheme"),
            dense=self._one("dense_scheme"),
            target_bits=self.target_bits,
            target_size=None if self.target_size is None else parse_bytes(self.target_size, "target_size"),
            per_expert=self.granularity == "expert",
            ignore=self.ignore,
            sensitivity=self.sensitivity,
            sample_tokens=self.sample_tokens,
            seed=self.seed,
        )
        router = self._one("router")
        self._router_scheme = router if router and router.scheme is not None else None
        _check_patterns(self.ignore)
        # A plan's own schemes are known only when it has been read.
        candidates = [] if self.plan_path is not None else self._asked.candidates
        every = [*candidates, *self._fixed()]
        nothing = self.kv_cache_scheme is None and all(candidate.scheme is None for candidate in every)
        if self.plan_path is None and nothing:
            raise ValueError(
                f"schemes={self.schemes} quantizes nothing; name a scheme, or leave the modifier out."
            )
        self._require_data_for(every)
        return self

    # Lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Refuse what cannot work; see the class."""
        session = self._join_session(state)
        if self.plan_path is not None:
            self._adopt_plan(self._load_report(QuantReport))
        self._refuse_another()
        planner = self._planner()
        refusals.check_not_quantized(state.model, planner.names)
        refusals.check_others(
            state.model,
            [m for m in recipe_modifiers() if m is not self],
            planner.names,
            self.kv_cache_scheme is not None,
        )
        routed = {
            name: linear
            for experts in planner.experts.values()
            for expert in experts
            for name, linear in expert.items()
        }
        fixed = [(field, [candidate], linears) for field, (candidate, linears) in planner.fixed.items()]
        refusals.check_shapes([(self._source, self._asked.candidates, routed), *fixed])
        if self._router_scheme is not None:
            check_routers(session, self._router_scheme)
        if self.servable and self.granularity == "layer":
            whole = set(planner.experts) == set(session.layers)
            refusals.check_servable(session.topology.model_type, self._asked.candidates, whole)
        quantizing = next((c for c in self._asked.candidates if c.scheme is not None), None)
        alike = [] if quantizing is None else [(self._source, quantizing, planner.first_experts)]
        refusals.check_names(
            state.model, [*((field, one, linears) for field, (one,), linears in fixed), *alike]
        )
        reason = wrong_mappings(session.topology.model_type, "AWQModifier")
        if self.algorithm == "awq" and reason is not None:
            raise ValueError(
                f"algorithm='awq' would change what a {session.topology.model_type!r} model computes: upstream's "
                f"mappings are wrong for it, {reason}. Use algorithm='gptq' or 'rtn'."
            )
        shrinks = any(isinstance(o, MoEModifier | REAPPruningModifier) for o in modifiers_before(self))
        if self._plan is None:
            planner.check_budget(shrinks)
        else:
            planner.check_plan(self._plan, shrinks)
        self._warn_of_settings(planner)
        if self._needs_data():
            self._batches = self._require_data(state, self._way_without_data())
        elif state.data.calib is not None:
            self._batches = state.data.calib
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Measure, choose, hand over to upstream."""
        session, skip = self._session, self._not_running()
        fit, held, apart = split_held_out(self._batches) if self._batches is not None else ([], [], False)
        change = None
        if self._router_scheme is not None:
            change = guard_routers(session, self._router_scheme, held, self.max_routing_change, skip)
        planner = self._planner()

        def decide() -> QuantReport:
            decided = planner.plan(fit, skip) if self._plan is None else planner.apply(self._plan)
            return QuantReport(**{**self._report_heading(None), **decided, "router_change": change})

        self._report = self._kept_decision(QuantReport, decide)
        self._warn_of_starved()
        if held:
            self._reference = heldout.observe_reference(session, held, apart, skip)
        mappings = awq_mappings(state.model) if self.algorithm == "awq" else None
        self._upstream = algorithms.UpstreamQuantization(
            self.algorithm, planner.groups(self._report), mappings, self.kv_cache_scheme
        )
        pin_only_with_an_accelerator()
        self._upstream.start(state, event, **kwargs)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """Upstream's algorithm at work."""
        self._upstream.sequential_epoch_end(state, event, modules, **kwargs)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Compare before and after; tell what happened."""
        self._upstream.end(state, event, **kwargs)
        report = self._report
        report.algorithm_notes = self._upstream.notes
        for note in report.algorithm_notes:
            logger.warning(f"RouterAwareQuantModifier ({self.algorithm}): {note}")
        if self._reference is not None:
            report.judge(
                *heldout.judge(self._session, self._reference, self._not_running()),
                apart=self._reference.apart,
                comparable=self.algorithm != "awq",
            )
            self._reference = None
        self._publish(report)
        if self.granularity == "expert" or not self.servable:
            state.model._research_only = True
        logger.info(report.describe())

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Upstream's finalize, then ours."""
        self._upstream.finalize(state, **kwargs)
        return super().on_finalize(state, **kwargs)

    # Helpers

    def _one(self, field: str) -> Candidate | None:
        spec = getattr(self, field)
        return None if spec is None else resolve_scheme(spec, self.group_size, field)

    def _require_data_for(self, candidates: list[Candidate]) -> None:
        static = any(needs_static_inputs(candidate.scheme) for candidate in candidates)
        self.requires_calibration_data = (
            algorithms.needs_data(self.algorithm) or static or self.kv_cache_scheme is not None
        )

    def _needs_data(self) -> bool:
        measures = self.plan_path is None and sensitivity(self.sensitivity).needs_data
        return self.requires_calibration_data or measures or self._router_scheme is not None

    def _way_without_data(self) -> str:
        """What to change in the fields so that no data is needed."""
        ways = {
            "leave router out": self._router_scheme is not None,
            "leave kv_cache_scheme out": self.kv_cache_scheme is not None,
            "use algorithm='rtn'": algorithms.needs_data(self.algorithm),
            "use schemes with dynamic or 16-bit inputs": any(
                needs_static_inputs(candidate.scheme)
                for candidate in [*self._asked.candidates, *self._fixed()]
            ),
            "use a plan_path or a sensitivity that needs no data": self.plan_path is None
            and sensitivity(self.sensitivity).needs_data,
        }
        return " and ".join(way for way, needed in ways.items() if needed)

    def _fixed(self) -> list[Candidate]:
        return [candidate for candidate in (self._asked.attention, self._asked.dense) if candidate]

    @property
    def _source(self) -> str:
        """Where the candidates come from, for messages."""
        return "schemes" if self.plan_path is None else f"plan_path={self.plan_path!r}: its schemes"

    def _refuse_another(self) -> None:
        if any(isinstance(o, RouterAwareQuantModifier) and o is not self for o in recipe_modifiers()):
            raise ValueError(
                "The recipe has several RouterAwareQuantModifiers, and each would quantize what another has "
                "rounded already; keep one: schemes, ignore, attention_scheme and dense_scheme can say it all."
            )

    def _adopt_plan(self, plan: QuantReport) -> None:
        """Take the candidates from a saved plan."""
        empty = sorted(
            name for name, scheme in plan.schemes.items() if scheme is None and name != UNQUANTIZED
        )
        if empty or not plan.schemes:
            what = (
                f"schemes.{empty[0]} is null, which only {UNQUANTIZED} may be"
                if empty
                else "schemes is empty"
            )
            raise PlanFileError(f"plan_path={self.plan_path!r}: {what}; write the scheme out.")
        specs: list[SchemeSpec] = [
            name if scheme is None else {name: scheme} for name, scheme in plan.schemes.items()
        ]
        try:
            candidates = resolve_schemes(specs, None, self._source)
        except ValueError as error:
            raise PlanFileError(str(error)) from error
        self._asked = replace(self._asked, candidates=candidates)
        self._plan = plan
        self._require_data_for([*candidates, *self._fixed()])

    def _planner(self) -> Planner:
        return Planner(self._session, self._asked)

    def _not_running(self) -> set[int]:
        """Blocks whose MoE layer does not run any more."""
        return self._session.dropped_blocks | self._session.dropped_layers

    def _warn_of_settings(self, planner: Planner) -> None:
        if self.granularity == "expert":
            logger.warning(
                "granularity='expert': vLLM cannot serve layers whose experts differ in their scheme."
            )
        names = [name for name, _ in self._session.model.named_modules()]
        for entry in self.ignore:
            # The default names the head, which not every model has under this name.
            if entry != "lm_head" and not any(match_name(name, entry) for name in names):
                logger.warning(
                    f"ignore: {entry!r} matches no module of the model; experts have names such as "
                    f"{planner.names[0]!r}."
                )

    def _warn_of_starved(self) -> None:
        starved = {
            layer: len(plan.starved_experts)
            for layer, plan in self._report.layers.items()
            if plan.starved_experts
        }
        if starved:
            logger.warning(
                f"{sum(starved.values())} experts saw too few calibration tokens to be judged by their own error "
                f"(layer: experts {starved}); their layer's mean error stands in. More or more varied data helps."
            )


def _check_patterns(ignore: list[str]) -> None:
    for entry in ignore:
        try:
            re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"ignore: {entry!r} is not a regular expression: {error}.") from error
