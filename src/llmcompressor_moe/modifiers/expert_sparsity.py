"""Expert sparsity: upstream's SparseGPT or Wanda with a ratio per expert."""

from __future__ import annotations

from typing import Any, Literal

from llmcompressor.core import Event, State
from loguru import logger
from pydantic import PrivateAttr, model_validator
from torch import nn

from llmcompressor_moe.modifiers.base import MoEModifier, modifiers_before
from llmcompressor_moe.modifiers.router_aware_quant import RouterAwareQuantModifier
from llmcompressor_moe.profile import Profile
from llmcompressor_moe.sparsity.importance import STATISTICS, importance_of, random_importance
from llmcompressor_moe.sparsity.pruning import Part, UpstreamPruning, linear_weights
from llmcompressor_moe.sparsity.ratios import experts_to_prune, ratio_of_structure, ratios_for_mean
from llmcompressor_moe.sparsity.report import SparsityReport, tables_of

__all__ = ["ExpertSparsityModifier"]


class ExpertSparsityModifier(MoEModifier):
    """Prunes the weights of routed experts with upstream's SparseGPT (arXiv 2301.00774) or Wanda (arXiv
    2306.11695), important experts less than others. Takes exactly one of ``sparsity`` and ``plan_path``.

    Sample YAML::

        ExpertSparsityModifier:
          sparsity: 0.5
          algorithm: wanda
          ratios: sensitivity

    Lifecycle:
        - on_initialize: look at the model, refuse what cannot work
        - on_calibration_start: take the statistics (one forward pass of our own); upstream's modifier is built
          on the experts that are there now
        - on_sequential_epoch_end: decide once, when all modifiers of a shared pass have dropped their blocks and
          MoE layers; prune what was calibrated
        - on_calibration_end: prune by magnitude what no token reached; tell what happened
        - on_finalize: make saving write a checkpoint that says what it is

    :param sparsity: share of all routed experts' weights that is set to zero; between 0 and 1
    :param algorithm: ``sparsegpt`` or ``wanda``
    :param mask_structure: ``0:0`` for any weights, or ``N:M``: N of M consecutive weights of a row. With ``N:M``
        an expert is pruned as a whole, by N/M, or not at all
    :param ratios: ``utilization`` (tokens routed to an expert), ``sensitivity`` (its router-weighted output) or
        ``uniform``; see docs/sparsity.md
    :param min_sparsity: smallest ratio of any expert; half of ``sparsity`` unless given
    :param max_sparsity: largest; halfway from ``sparsity`` to 1 unless given
    :param shared: ``spare`` shared experts, or ``prune`` them too, by ``sparsity`` (``N:M``: by N/M)
    :param seed: with ``N:M`` and ``uniform``, which experts are pruned
    """

    requires_calibration_data: bool = True

    sparsity: float | None = None
    algorithm: Literal["sparsegpt", "wanda"] = "sparsegpt"
    mask_structure: str = "0:0"
    ratios: Literal["utilization", "sensitivity", "uniform"] = "sensitivity"
    min_sparsity: float | None = None
    max_sparsity: float | None = None
    shared: Literal["spare", "prune"] = "spare"

    _plan: SparsityReport | None = PrivateAttr(default=None)
    _profile: Profile | None = PrivateAttr(default=None)
    # Original indices of the experts at the start of calibration: layer -> indices.
    _expert_ids: dict[int, list[int]] = PrivateAttr(default_factory=dict)
    _parts: list[Part] = PrivateAttr(default_factory=list)
    _pruning: UpstreamPruning | None = PrivateAttr(default=None)
    _decided: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _check_fields(self) -> ExpertSparsityModifier:
        self._check_one_of(("sparsity", "plan_path"))
        most = ratio_of_structure(self.mask_structure)
        bounds = {"min_sparsity": self.min_sparsity, "max_sparsity": self.max_sparsity}
        given = [f"{name}={value}" for name, value in bounds.items() if value is not None]
        if given and (self.plan_path is not None or most is not None or self.ratios == "uniform"):
            raise ValueError(
                f"{' and '.join(given)}: bounds go with sparsity, mask_structure '0:0' and ratios that differ; "
                "leave them out."
            )
        if self.plan_path is not None:
            if self.shared == "prune":
                raise ValueError(
                    "shared='prune' goes with sparsity; a plan names what shared experts lose in shared_ratios."
                )
            return self
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must lie between 0 and 1.")
        if most is not None and self.sparsity > most:
            raise ValueError(
                f"sparsity={self.sparsity}: mask_structure {self.mask_structure!r} sets at most {most:g} of the "
                "weights to zero."
            )
        low, high = self._bounds()
        if not 0 <= low <= self.sparsity <= high < 1:
            raise ValueError(
                f"min_sparsity={low:g} and max_sparsity={high:g} must lie in 0 to 1 (1 left out) with "
                f"sparsity={self.sparsity} between them."
            )
        return self

    # Lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Look at the model and the data; see the class."""
        self._join_session(state)
        self._batches = self._require_data(
            state, "leave it out of the recipe: SparseGPT and Wanda prune by the inputs that experts see"
        )
        self._refuse_quantized()
        self._check_columns()
        if self.plan_path is not None:
            structure = ratio_of_structure(self.mask_structure)
            counts = {layer: moe.num_experts for layer, moe in self._session.topology.moe_layers.items()}
            self._plan = self._load_report(SparsityReport)
            self._plan.check_ratios(
                self.mask_structure, None if structure is None else (0.0, structure), counts
            )
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Measure; begin to watch the experts' inputs."""
        session = self._session
        self._expert_ids = {layer: session.expert_ids(layer) for layer in session.layers}
        if self._plan is None and self.ratios in STATISTICS:
            self._profile = self._measure(STATISTICS[self.ratios])
        targets = []
        for layer in session.layers:
            targets.append(session.topology.moe_layers[layer].experts)
            for expert, module in zip(session.expert_ids(layer), session.experts(layer), strict=True):
                self._parts.append(Part(layer, expert, [module]))
            shared = self._shared_experts(layer)
            if shared and self._prunes_shared(layer):
                targets += shared
                modules = [session.model.get_submodule(path) for path in shared]
                self._parts.append(Part(layer, None, modules))
        self._pruning = UpstreamPruning(self.algorithm, self.mask_structure)
        self._pruning.start(state, event, targets, self._parts)

    def on_sequential_epoch_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Prune what has been calibrated."""
        self._decide()
        self._pruning.prune(state, event, **kwargs)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Prune what no token reached; tell what happened."""
        self._decide()
        self._pruning.end(state, event, [part for part in self._parts if self._is_there(part)], **kwargs)
        report = self._report()
        self._warn_of_fallback(report)
        self._parts, self._profile = [], None
        self._publish(report)
        logger.info(report.describe())

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Complete the model."""
        if self._pruning is not None:
            self._pruning.finalize(state)
        return super().on_finalize(state, **kwargs)

    # The decision

    def _decide(self) -> None:
        if self._decided:
            return
        self._decided = True
        parts = [part for part in self._parts if part.layer in self._session.layers]
        routed = [part for part in parts if part.expert is not None]
        for part, ratio in zip(routed, self._ratios(routed), strict=True):
            part.ratio = ratio
        for part in parts:
            if part.expert is None:
                planned = self._plan.shared_ratios if self._plan else {}
                part.ratio = planned.get(part.layer, ratio_of_structure(self.mask_structure) or self.sparsity)

    def _ratios(self, routed: list[Part]) -> list[float | None]:
        if self._plan is not None:
            ratios = self._plan.ratios
            return [ratios[part.layer][part.expert] if part.layer in ratios else 0.0 for part in routed]
        structure = ratio_of_structure(self.mask_structure)
        if structure is None and self.ratios == "uniform":
            return [self.sparsity] * len(routed)
        importance = self._importance(routed)
        sizes = [sum(shape.numel() for shape in linear_weights(part.modules)) for part in routed]
        if structure is None:
            return ratios_for_mean(importance, sizes, self.sparsity, *self._bounds())
        chosen = set(experts_to_prune(importance, sizes, self.sparsity / structure * sum(sizes)))
        return [structure if position in chosen else 0.0 for position in range(len(routed))]

    def _importance(self, routed: list[Part]) -> list[float]:
        if self._profile is None:
            values = random_importance(
                {layer: len(ids) for layer, ids in self._expert_ids.items()}, self.seed
            )
        else:
            values = importance_of(self.ratios, self._profile)
        by_expert = {
            (layer, expert): value
            for layer, row in values.items()
            for expert, value in zip(self._expert_ids[layer], row, strict=True)
        }
        return [by_expert[part.layer, part.expert] for part in routed]

    def _bounds(self) -> tuple[float, float]:
        low = self.sparsity / 2 if self.min_sparsity is None else self.min_sparsity
        high = (1 + self.sparsity) / 2 if self.max_sparsity is None else self.max_sparsity
        return low, high

    # The model

    def _shared_experts(self, layer: int) -> list[str]:
        """Paths of a layer's shared experts; a gate that scales them is a single Linear and none of them."""
        paths = self._session.topology.moe_layers[layer].shared_experts
        return [path for path in paths if not isinstance(self._session.model.get_submodule(path), nn.Linear)]

    def _prunes_shared(self, layer: int) -> bool:
        if self._plan is not None:
            return bool(self._plan.shared_ratios.get(layer))
        return self.shared == "prune"

    def _is_there(self, part: Part) -> bool:
        session = self._session
        if part.layer not in session.layers:
            return False
        return part.expert is None or part.expert in session.expert_ids(part.layer)

    def _refuse_quantized(self) -> None:
        # Upstream's modifiers attach their schemes when they are initialized: those before us have, those after
        # us have not.
        if any(isinstance(other, RouterAwareQuantModifier) for other in modifiers_before(self)):
            raise ValueError(
                "ExpertSparsityModifier cannot prune experts that RouterAwareQuantModifier has quantized; put "
                "ExpertSparsityModifier before it."
            )
        for layer in self._session.layers:
            for expert in self._session.experts(layer):
                for name, module in expert.named_modules():
                    scheme = getattr(module, "quantization_scheme", None)
                    if scheme is not None and scheme.weights is not None:
                        raise ValueError(
                            f"ExpertSparsityModifier cannot prune block {layer}: {name} of its experts is "
                            "quantized already, by the checkpoint or by an earlier modifier. Put "
                            "ExpertSparsityModifier before the modifier that quantizes, and start from a "
                            "checkpoint that is not quantized."
                        )

    def _check_columns(self) -> None:
        if ratio_of_structure(self.mask_structure) is None:
            return
        group = int(self.mask_structure.partition(":")[2])
        for layer in self._session.layers:
            modules = self._session.experts(layer)
            if self.shared == "prune":
                modules = [
                    *modules,
                    *(self._session.model.get_submodule(path) for path in self._shared_experts(layer)),
                ]
            uneven = {shape[1] for shape in linear_weights(modules) if shape[1] % group}
            if uneven:
                raise ValueError(
                    f"mask_structure={self.mask_structure!r}: block {layer} has expert weights with "
                    f"{min(uneven)} columns, which is not a multiple of {group}; choose another M or '0:0'."
                )

    # The report

    def _report(self) -> SparsityReport:
        counts = {layer: moe.num_experts for layer, moe in self._session.topology.moe_layers.items()}
        tokens = None
        if self._profile is not None:
            layers = self._profile.experts.items()
            tokens = {
                layer: dict(zip(self._expert_ids[layer], profile.routed_tokens, strict=True))
                for layer, profile in layers
            }
        return SparsityReport(
            algorithm=self.algorithm,
            mask_structure=self.mask_structure,
            **tables_of(self._parts, counts, tokens),
            **self._report_heading(self._profile),
        )

    def _warn_of_fallback(self, report: SparsityReport) -> None:
        if report.fallback:
            counts = {layer: len(experts) for layer, experts in report.fallback.items()}
            logger.warning(
                f"{sum(counts.values())} experts were pruned by magnitude, because no calibration token reached "
                f"them (layer: experts {counts}). More or more varied calibration data, or "
                "moe_calibrate_all_experts=True, gives them inputs to prune by."
            )
