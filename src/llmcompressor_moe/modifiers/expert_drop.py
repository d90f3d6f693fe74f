"""Expert Drop: remove routed experts and their rows in the router."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.offload import align_modules
from llmcompressor.core import State
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from loguru import logger
from pydantic import model_validator
from torch import nn

from llmcompressor_moe.counts import allowed_counts, possible_total
from llmcompressor_moe.criteria import expert_criterion
from llmcompressor_moe.criteria.experts import ScoreInput
from llmcompressor_moe.families import exception_for
from llmcompressor_moe.modifiers.damage_curves import Wanted, choose_by_damage
from llmcompressor_moe.modifiers.trim import TrimModifier
from llmcompressor_moe.plan import ExpertRoom, amount_of, experts_to_drop
from llmcompressor_moe.profile import Profile, Statistic
from llmcompressor_moe.report import DropCurves, DropReport
from llmcompressor_moe.surgery.config import set_expert_count
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["ExpertDropModifier"]


class ExpertDropModifier(TrimModifier):
    """Drops routed experts (arXiv 2406.02500, Expert Drop); shared experts stay.

    The lowest-scoring experts go, with their rows in the router and in every other per-expert tensor. The
    same number in every layer (``scope="layer"``) gives a plain checkpoint; the other two scopes write
    ``per_layer_config``. Takes exactly one of ``num_drop``, ``drop_ratio``, ``experts`` and ``plan_path``.

    ``scope="global"`` pools the scores of all layers. ``scope="sensitivity"`` measures what layers are worth in
    one unit: KL(intact model || model with some of one layer's experts gone) of the output, in nats per token, at
    up to four counts per layer; and chooses the counts with the least sum. It takes a second pass over some of the
    calibration data, which costs at most 8 bare passes over all of it; ``curves`` of the report say what it found.

    Sample YAML::

        ExpertDropModifier:
          num_drop: 2
          criterion: router_score
          scope: sensitivity
          min_experts: 4

    :param num_drop: experts to drop per layer (their mean, where layers may differ)
    :param drop_ratio: share of each layer's experts that goes, rounded down
    :param experts: block index -> experts that go; needs no data
    :param criterion: router_score, frequency, reap, output_norm, weight_norm, redundancy or random
    :param scope: ``layer``, ``global`` or ``sensitivity``
    :param min_experts: fewest experts per layer; never under what the router has to choose
    :param round_to: the number of experts that a layer keeps is a multiple of this (expert parallelism needs one);
        fewer are dropped where the amount does not come out even. Protected layers keep what they have
    :param protect: blocks whose experts all stay
    """

    num_drop: int | None = None
    drop_ratio: float | None = None
    experts: dict[int, list[int]] | None = None
    criterion: str = "router_score"
    scope: Literal["layer", "global", "sensitivity"] = "layer"
    min_experts: int | None = None
    round_to: int | None = None

    cuts_before_the_pass: ClassVar[bool] = False
    plan_kind: ClassVar[type] = dict

    @model_validator(mode="after")
    def _check_amount(self) -> ExpertDropModifier:
        expert_criterion(self.criterion)
        if self.num_drop is not None and self.num_drop < 1:
            raise ValueError(f"num_drop={self.num_drop} must be at least 1.")
        if self.drop_ratio is not None and not 0 < self.drop_ratio < 1:
            raise ValueError(f"drop_ratio={self.drop_ratio} must lie between 0 and 1.")
        if self.min_experts is not None and self.min_experts < 1:
            raise ValueError(f"min_experts={self.min_experts} must be at least 1.")
        self._check_round_to()
        for layer, experts in (self.experts or {}).items():
            if not experts or len(set(experts)) != len(experts):
                raise ValueError(f"experts[{layer}]={experts} must name at least one expert, each only once.")
            if layer in self.protect:
                raise ValueError(f"experts[{layer}] and protect={self.protect} name the same block.")
        if self.experts == {}:
            raise ValueError("experts={} names no expert.")
        return self

    def _check_round_to(self) -> None:
        if self.round_to is None:
            return
        if self.round_to < 1:
            raise ValueError(f"round_to={self.round_to} must be at least 1.")
        if self.num_drop is None and self.drop_ratio is None:
            raise ValueError(
                f"round_to={self.round_to} rounds amounts, and this ExpertDropModifier names the experts: "
                "leave it out, or give num_drop or drop_ratio."
            )
        if self.scope == "global":
            raise ValueError(
                f"round_to={self.round_to} does not go with scope='global': use scope='sensitivity' or "
                "scope='layer'."
            )

    def _amount_fields(self) -> tuple[str, ...]:
        return ("num_drop", "drop_ratio", "experts", "plan_path")

    def _needs_data(self) -> bool:
        if self.experts is not None or self.plan_path is not None:
            return False
        return self.scope == "sensitivity" or bool(expert_criterion(self.criterion).statistics)

    def _statistics(self) -> set[Statistic]:
        return set(expert_criterion(self.criterion).statistics) if self._needs_data() else set()

    def _check_model(self, session: TrimSession) -> None:
        reason = exception_for(session.topology.model_type).refuse_expert_drop
        if reason is not None:
            raise ValueError(f"ExpertDropModifier cannot trim {session.topology.model_type!r}: {reason}.")
        named = self._named()
        if named is not None:
            self._check_named(named)
        else:
            self._check_room()
        uniform = self._is_uniform(named)
        reason = exception_for(session.topology.model_type).refuse_uneven
        if not uniform and reason is not None:
            raise ValueError(
                f"ExpertDropModifier must leave every layer of {session.topology.model_type!r} the same "
                f"number of experts: {reason}."
            )
        if not uniform and any(isinstance(other, REAPPruningModifier) for other in self._later):
            raise ValueError(
                "REAPPruningModifier assumes the same number of experts in every layer, and this "
                "ExpertDropModifier leaves different "
                "numbers. Put REAPPruningModifier before it, or use ExpertDropModifier(criterion='reap')."
            )

    def _named(self) -> dict[int, list[int]] | None:
        return self.experts if self.plan_path is None else self._load_plan()

    def _check_named(self, named: dict[int, list[int]]) -> None:
        for layer, experts in named.items():
            if layer not in self._session.layers:
                raise ValueError(
                    f"experts[{layer}]: block {layer} has no MoE layer; those that have one are "
                    f"{self._session.layers}."
                )
            present = set(self._session.expert_ids(layer))
            unknown = sorted(set(experts) - present)
            if unknown:
                raise ValueError(
                    f"experts[{layer}]={experts}: {unknown} are not among the layer's experts "
                    f"{sorted(present)}."
                )
            room = self._room(layer)
            if len(present) - len(experts) < room.floor:
                raise ValueError(
                    f"experts[{layer}]={experts} would leave {len(present) - len(experts)} of "
                    f"{len(present)} experts; at least {room.floor} must "
                    "stay (top_k, groups and min_experts)."
                )
            size = len(present) // room.num_groups
            per_group = [
                sum(expert // size == group for expert in experts) for group in range(room.num_groups)
            ]
            if len(set(per_group)) > 1:
                raise ValueError(
                    f"experts[{layer}]={experts}: the router is group-limited; each of its "
                    f"{room.num_groups} groups must lose as many."
                )

    def _check_room(self) -> None:
        """Try the amount on equal scores: whether it fits does not depend on the scores."""
        layers = self._layers()
        if not layers:
            raise ValueError(f"protect={self.protect} leaves no MoE layer to drop experts from.")
        rooms = {layer: self._room(layer) for layer in layers}
        for layer in layers:
            count = self._session.layer(layer).num_experts
            amount_of(self.num_drop, self.drop_ratio, count, f"experts of layer {layer}")
        if self.scope == "sensitivity":
            self._wanted(rooms)
        else:
            self._choose({layer: [0.0] * room.num_experts for layer, room in rooms.items()}, rooms)

    def _is_uniform(self, named: dict[int, list[int]] | None) -> bool:
        """Whether every layer is left with the same number of experts."""
        layers = self._session.layers
        counts = {layer: self._session.layer(layer).num_experts for layer in layers}
        if named is not None:
            return len({counts[layer] - len(named.get(layer, ())) for layer in layers}) == 1
        return self.scope == "layer" and not self.protect and len(set(counts.values())) == 1

    def _layers(self) -> list[int]:
        return [layer for layer in self._session.layers if layer not in self.protect]

    def _room(self, layer: int) -> ExpertRoom:
        moe = self._session.layer(layer)
        return ExpertRoom(moe.num_experts, max(moe.min_experts, self.min_experts or 1), moe.num_groups)

    def _choose(
        self, scores: dict[int, list[float | None]], rooms: dict[int, ExpertRoom]
    ) -> dict[int, list[int]]:
        per_layer = {layer: self._amount(room.num_experts, layer) for layer, room in rooms.items()}
        if self.scope == "global":
            return experts_to_drop(scores, rooms, 0, "global", total=sum(per_layer.values()))
        chosen: dict[int, list[int]] = {}
        for layer, count in per_layer.items():
            room = rooms[layer]
            if self.round_to is not None and room.num_experts - count >= room.floor:
                count = self._rounded(count, layer, room)
            chosen |= experts_to_drop({layer: scores[layer]}, {layer: room}, count, "layer")
        return chosen

    def _rounded(self, count: int, layer: int, room: ExpertRoom) -> int:
        """The most that layer scope may drop, up to ``count``."""
        counts = [allowed for allowed in allowed_counts(room, self.round_to) if 0 < allowed <= count]
        if not counts:
            raise ValueError(
                f"round_to={self.round_to}: layer {layer} has {room.num_experts} experts, needs {room.floor} and "
                f"is to lose {count} at most, and nothing in between is a multiple: drop more, or lower round_to."
            )
        return counts[-1]

    def _wanted(self, rooms: dict[int, ExpertRoom]) -> Wanted:
        """What sensitivity scope chooses among; whether it fits does not depend on the scores."""
        amounts = {layer: self._amount(room.num_experts, layer) for layer, room in rooms.items()}
        allowed = {layer: allowed_counts(room, self.round_to) for layer, room in rooms.items()}
        asked = sum(amounts.values())
        total = possible_total(allowed, asked)
        if self.round_to is None and total != asked:
            # Floors or groups: global scope stands before the same ones, and says so.
            experts_to_drop(
                {layer: [0.0] * room.num_experts for layer, room in rooms.items()}, rooms, 0, "global", asked
            )
        if not total:
            raise ValueError(
                f"round_to={self.round_to}: at most {asked} experts are to be dropped in all, and no choice that "
                "leaves every layer a multiple of it drops so few: drop more, or lower round_to or min_experts."
            )
        return Wanted(rooms, allowed, amounts, total)

    def _amount(self, num_experts: int, layer: int) -> int:
        return amount_of(self.num_drop, self.drop_ratio, num_experts, f"experts of layer {layer}")

    def _decide(self) -> DropReport:
        named = self._named()
        if named is not None:
            return self._report_of(
                {}, {layer: sorted(experts) for layer, experts in sorted(named.items())}, None
            )
        criterion = expert_criterion(self.criterion)
        profile = self._profile() if criterion.statistics else None
        scores = {layer: self._scores(layer, profile) for layer in self._session.layers}
        self._warn_of_unseen(profile)
        rooms = {layer: self._room(layer) for layer in self._layers()}
        ours = {layer: scores[layer] for layer in rooms}
        curves = None
        if self.scope == "sensitivity":
            positions, curves = choose_by_damage(self._session, self._batches, ours, self._wanted(rooms))
        else:
            positions = self._choose(ours, rooms)
        ids = {layer: self._session.expert_ids(layer) for layer in positions}
        dropped = {
            layer: sorted(ids[layer][position] for position in chosen) for layer, chosen in positions.items()
        }
        return self._report_of(scores, dropped, profile, curves)

    def _scores(self, layer: int, profile: Profile | None) -> list[float | None]:
        """One score per expert that the layer has now."""
        criterion = expert_criterion(self.criterion)
        scores = criterion.score(
            ScoreInput(
                profile=profile.experts[layer] if profile else None,
                num_samples=profile.num_samples if profile else 0,
                num_experts=len(self._session.experts(layer)),
                weights=(_weights(expert) for expert in self._session.experts(layer)),
                layer=layer,
                seed=self.seed,
            )
        )
        if profile is None:
            return scores
        by_id = dict(zip(self._shared.expert_ids[layer], scores, strict=True))
        return [by_id[expert] for expert in self._session.expert_ids(layer)]

    def _warn_of_unseen(self, profile: Profile | None) -> None:
        if profile is None:
            return
        unseen = {
            layer: p.routed_tokens.count(0) for layer, p in profile.experts.items() if 0 in p.routed_tokens
        }
        if unseen:
            logger.warning(
                f"{sum(unseen.values())} experts saw no calibration token (layer: experts {unseen}); "
                f"without a score they go first. More or "
                "more varied calibration data tells whether they are needed."
            )

    def _report_of(
        self,
        scores: dict[int, Any],
        dropped: dict[int, list[int]],
        profile: Profile | None,
        curves: DropCurves | None = None,
    ) -> DropReport:
        session = self._session
        all_scores: dict[int, Any] = {}
        kept = {}
        for layer in session.layers:
            ids = session.expert_ids(layer)
            by_id = dict(zip(ids, scores.get(layer, [None] * len(ids)), strict=True))
            count = session.topology.moe_layers[layer].num_experts
            all_scores[layer] = [by_id.get(expert) for expert in range(count)]
            kept[layer] = [expert for expert in ids if expert not in dropped.get(layer, [])]
        report = self._new_report(all_scores, dropped, kept, profile)
        report.curves = curves
        if curves is not None and profile is None:
            report.calibration = {"tokens": curves.tokens, "samples": curves.samples}
        return report

    def _cut(self, dropped: dict[int, list[int]], state: State) -> None:
        for layer, experts in dropped.items():
            self._session.drop_experts(layer, experts)
        for other in self._later:
            # REAP counts the experts when the recipe starts; after a uniform cut it has to count again.
            if isinstance(other, REAPPruningModifier) and not other.started_:
                count = {len(self._session.experts(layer)) for layer in self._session.layers}
                set_expert_count(state.model.config, count.pop())
                other.on_initialize(state)


def _weights(expert: nn.Module) -> list[torch.Tensor]:
    """Its matrices; a later modifier may have given it scales, which hold anything until they are computed."""
    with align_modules(list(expert.modules())):
        return [module.weight.detach() for module in expert.modules() if isinstance(module, nn.Linear)]
