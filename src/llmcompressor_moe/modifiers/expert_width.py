"""Expert Width: structured pruning inside experts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from compressed_tensors.offload import align_modules
from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization
from llmcompressor.core import Event, State
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from llmcompressor_moe.checkpoint.opened import keeps_stored_precision
from llmcompressor_moe.criteria.channels import (
    fitted_down,
    highest,
    keep_by_surgery,
    magnitude,
    output_power,
    saliency,
    squared_error,
)
from llmcompressor_moe.families import exception_for
from llmcompressor_moe.modifiers.base import MoEModifier, modifiers_before
from llmcompressor_moe.modifiers.expert_sparsity import ExpertSparsityModifier
from llmcompressor_moe.modifiers.router_aware_quant import RouterAwareQuantModifier
from llmcompressor_moe.modifiers.width_curves import (
    ChannelScores,
    NarrowRoom,
    channels_of,
    choose_widths,
    narrow_room,
)
from llmcompressor_moe.profile.channels import ChannelSums, RoutedChannels, SharedChannels
from llmcompressor_moe.profile.forward import sum_over_ranks, tokens_of
from llmcompressor_moe.profile.observing import Observer, observe_batches
from llmcompressor_moe.profile.splitting import in_fixed_order
from llmcompressor_moe.report import PlanFileError, WidthReport, as_hex
from llmcompressor_moe.surgery.config import describe_widths
from llmcompressor_moe.surgery.width import (
    WidthFields,
    keep_channels,
    note_width,
    width_fields,
    width_of,
)

__all__ = ["ExpertWidthModifier"]

SHARED = "shared"
_STEP = 64
# A narrow expert still has so many steps.
_FEWEST_STEPS = 8

# (layer, name in the report -> expert, sums of each)
LayerDone = Callable[[int, dict[str, nn.Module], list[ChannelSums]], None]


class ExpertWidthModifier(MoEModifier):
    """Cuts channels out of routed experts: rows of the gate and up projections, and the columns of the down
    projection that read them. Each expert loses its own channels; all experts get the same width.

    The same width in all layers gives a stock checkpoint: a field of the config says it; where layers differ,
    ``per_layer_config`` does. Takes exactly one of ``drop_ratio``, ``width`` and ``plan_path``.

    ``scope="sensitivity"`` measures what layers are worth in one unit: KL(intact model || model with one layer's
    experts cut) of the output, in nats per token, at up to four widths per layer; and chooses the widths with the
    least sum. It takes one more pass over some of the calibration data, which costs at most 8 bare passes over all
    of it, and with ``refit`` the cut is a pass of its own; ``curves`` of the report say what it found.

    Sample YAML::

        ExpertWidthModifier:
          drop_ratio: 0.25

    With ``refit``, the down projection of each expert is fitted to what the expert gave before, in closed form,
    and channels are also chosen by optimal brain surgery on the same second moments. An expert keeps what is best
    on tokens that nothing was decided on: an eighth of those that it saw, 256 at most.

    Lifecycle:
        - on_initialize: look at the model, find the config fields that say the width, refuse what cannot work
        - on_calibration_start: with ``scope="sensitivity"`` a pass that ranks channels, and one that measures
          what layers lose; then a forward pass of our own in which experts of a block are cut when all samples
          have passed it, so that second moments are held for one layer at a time
        - on_finalize: make saving write a checkpoint that says what it is

    :param drop_ratio: share of each expert's channels that goes (its mean, where layers may differ); fewer where
        ``multiple_of`` asks for it
    :param width: channels that stay (their mean, where layers may differ)
    :param multiple_of: the width that stays is a multiple of it. Defaults to 64, which suits kernels and tensor
        parallelism; to a smaller power of two where an expert has fewer than 512 channels
    :param criterion: ``saliency`` (see `criteria.channels.saliency`), ``activation`` (its first factor),
        ``weight_norm`` or ``random``
    :param refit: fit down projections; with ``saliency``, choose by optimal brain surgery as well
    :param shared_experts: also cut shared experts, to the same share of their channels. Some families have one
        config field for both, and need it
    :param scope: ``layer``: the same share in every layer; ``sensitivity``: more where it costs less
    :param protect: blocks whose experts stay as they are; the layers then differ
    """

    requires_calibration_data: bool = False

    drop_ratio: float | None = None
    width: int | None = None
    multiple_of: int | None = None
    criterion: Literal["saliency", "activation", "weight_norm", "random"] = "saliency"
    refit: bool = True
    shared_experts: bool = False
    scope: Literal["layer", "sensitivity"] = "layer"
    protect: list[int] = Field(default_factory=list)

    _plan: WidthReport | None = PrivateAttr(default=None)
    # Layer that is cut -> channels before and after; and what the config has to say of it.
    _widths: dict[int, tuple[int, int]] = PrivateAttr(default_factory=dict)
    _fields: dict[int, WidthFields] = PrivateAttr(default_factory=dict)
    _found: WidthReport | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_fields(self) -> ExpertWidthModifier:
        self._check_one_of(("drop_ratio", "width", "plan_path"))
        self._check_protect(self.protect)
        if self.drop_ratio is not None and not 0 < self.drop_ratio < 1:
            raise ValueError(f"drop_ratio={self.drop_ratio} must lie between 0 and 1.")
        for name in ("width", "multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        return self

    # Lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Look at the model and the data; see the class."""
        self._join_session(state)
        self._refuse_compressed(state)
        self._plan = self._load_report(WidthReport) if self.plan_path is not None else None
        self._widths = self._asked(self._present_width())
        self._fields = self._described()
        self._check_shared()
        if self.needs_data():
            way_out = "set scope: layer, criterion: weight_norm and refit: false"
            self._batches = self._require_data(state, way_out)
        elif self.refit and state.data.calib is not None and len(state.data.calib):
            # A plan, which names down projections that were fitted.
            self._batches = state.data.calib
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Measure, choose and cut, layer by layer."""
        session = self._session
        self._found = WidthReport(widths={}, kept={}, **self._report_heading(None))
        sums: Mapping[int, Sequence[ChannelSums] | None] = {}
        if self.measures_curves():
            sums = self._choose_widths()
        parts = {layer: self._parts(layer) for layer in session.layers if layer in self._widths}
        if self._batches is not None and (self.refit or not self.measures_curves()):
            self._found.calibration = self._in_a_pass(parts, self.refit, self._cut)
        else:
            for layer, experts in parts.items():
                self._cut(layer, experts, sums.get(layer))
        fields = {layer: self._fields[layer].values if layer in parts else {} for layer in session.layers}
        describe_widths(session.model.config, fields)
        for layer in parts:
            for path in (session.layer(layer).module, session.layer(layer).experts):
                note_width(session.model.get_submodule(path), *self._widths[layer])
        self._publish(self._found)
        logger.info(self._found.describe())

    # What is asked for

    def needs_data(self) -> bool:
        """Whether it cannot do without calibration data."""
        return self.measures_curves() or (self.plan_path is None and (self.refit or self._ranks_by_data()))

    def measures_curves(self) -> bool:
        """Whether data decides how much each layer loses."""
        return self.plan_path is None and self.scope == "sensitivity"

    def statistics_passes(self) -> int:
        """Passes over the calibration data beside the one that measures curves."""
        if self.measures_curves():
            return self._ranks_by_data() + self.refit
        return int(self.needs_data())

    def _ranks_by_data(self) -> bool:
        return self.criterion in ("saliency", "activation")

    def _present_width(self) -> int:
        session = self._session
        if not session.layers:
            raise ValueError("ExpertWidthModifier: the model has no MoE layer.")
        unknown = sorted(set(self.protect) - set(session.layers))
        if unknown:
            raise ValueError(f"protect={self.protect}: blocks {unknown} have no MoE layer.")
        widths = {layer: width_of(session.model, session.layer(layer)) for layer in session.layers}
        if len(set(widths.values())) != 1:
            raise ValueError(
                "ExpertWidthModifier cuts models whose MoE layers have experts of one width; here block -> "
                f"width is {widths}."
            )
        return widths[session.layers[0]]

    def _asked(self, old: int) -> dict[int, tuple[int, int]]:
        if self._plan is None:
            layers = [layer for layer in self._session.layers if layer not in self.protect]
            return {layer: (old, new) for layer, new in self.widths_from(old, layers).items()}
        widths = self._plan.widths
        if not widths or any(before != old or not 0 < new < old for before, new in widths.values()):
            raise PlanFileError(
                f"The plan's widths = {widths} must lead from {old}, the present width, to fewer channels."
            )
        unknown = sorted(set(widths) - set(self._session.layers))
        if unknown:
            raise PlanFileError(f"The plan's widths = {widths}: blocks {unknown} have no MoE layer.")
        return widths

    def _described(self) -> dict[int, WidthFields]:
        """What the config has to say of each layer that is cut."""
        session = self._session
        if not self._widths:
            raise ValueError(f"protect={self.protect} leaves no MoE layer to cut.")
        uneven = (
            self.measures_curves()
            or len(self._widths) < len(session.layers)
            or len(set(self._widths.values())) > 1
        )
        reason = exception_for(session.topology.model_type).refuse_uneven
        if uneven and reason is not None:
            raise ValueError(
                f"ExpertWidthModifier must leave experts of the same width in every layer of "
                f"{session.topology.model_type!r}: {reason}. Use scope='layer' and leave protect out."
            )
        moe = session.layer(session.layers[0])
        known = {
            change: width_fields(session.model, moe, *change, alone=uneven)
            for change in set(self._widths.values())
        }
        return {layer: known[change] for layer, change in self._widths.items()}

    def widths_from(self, old: int, layers: Sequence[int]) -> dict[int, int]:
        """Layer -> channels that stay of ``old``, without a plan; where data decides, as even as can be.
        Layers that lose none are left out.

        :param layers: that may be cut
        :raises ValueError: none would go
        """
        if not layers:
            return {}
        if not self.measures_curves():
            return dict.fromkeys(layers, self._width_from(old))
        return {layer: old - gone for layer, gone in self._room(old, layers).evenly().items() if gone}

    def _room(self, old: int, layers: Sequence[int]) -> NarrowRoom:
        """What sensitivity scope chooses among."""
        step = self.multiple_of or _default_step(old)
        if self.width is not None and not step <= self.width < old:
            raise ValueError(
                f"width={self.width} must be under {old}, the present width, and at least {step}, the step "
                "between widths (multiple_of)."
            )
        share = old - self.width if self.width is not None else old * self.drop_ratio
        room = narrow_room(old, step, layers, share)
        if room is None:
            raise ValueError(
                f"{'drop_ratio' if self.width is None else 'width'}="
                f"{self.drop_ratio if self.width is None else self.width}: {share:g} of {old} channels in "
                f"{len(layers)} layers are too few for one layer to keep a smaller multiple of {step}: cut more, "
                "or set multiple_of to a smaller number."
            )
        return room

    def _width_from(self, old: int) -> int:
        step = self.multiple_of or _default_step(old)
        if self.width is not None:
            if self.width >= old or (self.multiple_of and self.width % step):
                raise ValueError(
                    f"width={self.width} must be under {old}, the present width"
                    + (f", and a multiple of multiple_of={step}." if self.multiple_of else ".")
                )
            return self.width
        new = max(step, -(-round(old * (1 - self.drop_ratio), 6) // step) * step)
        if new >= old:
            raise ValueError(
                f"drop_ratio={self.drop_ratio} of {old} channels leaves no smaller multiple of {step}: set "
                f"multiple_of to a smaller number, or drop_ratio to {step / old:.3g} or more."
            )
        return int(new)

    def _check_shared(self) -> None:
        layer, fields = next(iter(self._fields.items()))
        module = self._session.layer(layer).module
        for path in fields.shared:
            shared = self._session.model.get_submodule(f"{module}.{path}")
            if not isinstance(getattr(shared, "down_proj", None), nn.Linear):
                raise ValueError(
                    f"ExpertWidthModifier: {', '.join(fields.values)} in the config is the width of routed "
                    f"and of shared experts, and {path} is not made of Linear modules, which this version needs "
                    "to cut it."
                )
        if fields.shared and not self.shared_experts:
            (field,) = fields.values
            raise ValueError(
                f"{self._session.topology.model_type!r}: {field} in its config is the width of routed and of "
                "shared experts. Set shared_experts: true to cut both, or choose a width of which the present "
                "one is a multiple, if shared experts are counted."
            )
        if self.shared_experts and not fields.shared:
            raise ValueError(
                f"shared_experts=True: {self._session.topology.model_type!r} has no shared experts that share "
                "their width with routed ones. Leave shared_experts out."
            )

    def _refuse_compressed(self, state: State) -> None:
        if keeps_stored_precision(state.model):
            raise ValueError(
                "ExpertWidthModifier cannot cut weights that are stored quantized: their groups span channels. "
                "Open the checkpoint with requantize=True (--requantize)."
            )
        for other in modifiers_before(self):
            if isinstance(other, RouterAwareQuantModifier | ExpertSparsityModifier | SparsityModifierBase):
                raise ValueError(
                    f"ExpertWidthModifier would undo what {type(other).__name__} does to experts; put "
                    "ExpertWidthModifier before it."
                )
        # Upstream's modifiers attach their schemes when they are initialized: those before us have, those after us
        # have not.
        for layer in self._session.layers:
            for expert in self._session.experts(layer):
                for name, module in expert.named_modules():
                    if getattr(module, "quantization_scheme", None) is not None:
                        raise ValueError(
                            f"ExpertWidthModifier cannot cut block {layer}: {name} of its experts is quantized "
                            "already, by the checkpoint or by an earlier modifier. Put ExpertWidthModifier "
                            "before the modifier that quantizes."
                        )

    # The cut

    def _parts(self, layer: int) -> dict[str, nn.Module]:
        """Name in the report -> expert."""
        session = self._session
        routed = dict(zip(map(str, session.expert_ids(layer)), session.experts(layer), strict=True))
        module = session.layer(layer).module
        shared = {f"{SHARED} {n}": f"{module}.{path}" for n, path in enumerate(self._fields[layer].shared)}
        return routed | {name: session.model.get_submodule(path) for name, path in shared.items()}

    def _choose_widths(self) -> dict[int, Sequence[ChannelSums] | None]:
        """Decide how wide the experts of each layer become; returns what the choice of channels needs."""
        session = self._session
        old = self._present_width()
        layers = [layer for layer in session.layers if layer not in self.protect]
        # Fields and shared experts are those of the probe: all of one field, and none depends on the width.
        probe = next(iter(self._fields.values()))
        self._fields = dict.fromkeys(layers, probe)
        parts = {layer: self._parts(layer) for layer in layers}
        sums: dict[int, list[ChannelSums] | None] = dict.fromkeys(layers)
        scores: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in layers}

        def rank(layer: int, experts: dict[str, nn.Module], seen: list[ChannelSums] | None) -> None:
            for position, (name, expert) in enumerate(experts.items()):
                with align_modules(list(expert.modules())):
                    one = self._scores(layer, name, expert, None if seen is None else seen[position])
                scores[layer][name] = one.cpu()
            if seen is not None:
                sums[layer] = [*(sums[layer] or []), *seen]

        if self._ranks_by_data():
            self._found.calibration = self._in_a_pass(parts, False, rank)
        else:
            for layer, experts in parts.items():
                rank(layer, experts, None)
        ranked = {
            layer: ChannelScores(
                [one for name, one in found.items() if not name.startswith(SHARED)],
                {parts[layer][name]: one for name, one in found.items() if name.startswith(SHARED)},
            )
            for layer, found in scores.items()
        }
        gone, curves = choose_widths(session, self._batches, ranked, self._room(old, layers))
        self._found.curves = curves
        self._found.calibration = self._found.calibration or {
            "tokens": curves.tokens,
            "samples": curves.samples,
        }
        self._widths = {layer: (old, old - channels) for layer, channels in gone.items()}
        self._fields = {
            layer: replace(probe, values=dict.fromkeys(probe.values, new))
            for layer, (_, new) in self._widths.items()
        }
        return sums

    def _in_a_pass(
        self, parts: dict[int, dict[str, nn.Module]], moments: bool, then: LayerDone
    ) -> dict[str, int]:
        """Watch channels in one pass.

        :param moments: whether to add up second moments
        :param then: called for the routed experts of a layer, and for each shared one, when all batches have
            passed the block
        :return: tokens and samples
        """
        session = self._session
        observers: list[Observer] = []
        for block in session.running_topology().blocks:
            experts = parts.get(block.index)
            if block.moe is None or experts is None:
                continue
            routed = {name: module for name, module in experts.items() if not name.startswith(SHARED)}
            done = partial(then, block.index)
            observers.append(RoutedChannels(session.model, block, moments, partial(done, routed)))
            observers += [
                SharedChannels(module, block.index, moments, partial(done, {name: module}))
                for name, module in experts.items()
                if name.startswith(SHARED)
            ]
        # Which tokens an expert is judged by goes by their place.
        batches = in_fixed_order(self._batches)
        observe_batches(session.model, observers, batches, "Expert width")
        seen = torch.tensor([(len(batch["input_ids"]), tokens_of(batch)) for batch in batches])
        samples, tokens = sum_over_ranks(seen.sum(dim=0)).tolist()
        return {"tokens": tokens, "samples": samples}

    def _cut(self, layer: int, experts: dict[str, nn.Module], sums: Sequence[ChannelSums] | None) -> None:
        old, new = self._widths[layer]
        report = self._found
        report.widths[layer] = (old, new)
        kept, refitted = report.kept.setdefault(layer, {}), report.refitted.setdefault(layer, [])
        lost = torch.zeros(2, dtype=torch.float64)
        for position, (name, expert) in enumerate(experts.items()):
            seen = sums[position] if sums is not None else None
            count = channels_of(expert.down_proj.in_features, old, new)
            channels, down, errors = self._choose(layer, name, expert, seen, count)
            kept[name] = as_hex(channels, expert.down_proj.in_features)
            if down is not None:
                refitted.append(name)
            keep_channels(expert, channels, down)
            for module in expert.modules():
                if getattr(module, "quantization_scheme", None) is not None:
                    # A later modifier has given it scales for its former shape.
                    initialize_module_for_quantization(module)
            if not name.startswith(SHARED):
                lost += errors
        if sums is not None and lost[1]:
            report.lost[layer] = float(lost[0] / lost[1])

    def _choose(
        self, layer: int, name: str, expert: nn.Module, seen: ChannelSums | None, count: int
    ) -> tuple[list[int], torch.Tensor | None, torch.Tensor]:
        """Channels that stay, a new down projection where that is better, and (squared error, squared output) on
        tokens that nothing was decided on.
        """
        with align_modules(list(expert.modules())):
            down = expert.down_proj.weight.detach()
            if self._plan is not None:
                chosen = self._plan.channels(layer, name, down.shape[1], count)
            else:
                chosen = highest(self._scores(layer, name, expert, seen), count)
            if seen is None or not seen.tokens or seen.moments is None:
                return chosen, None, torch.zeros(2, dtype=torch.float64)
            moments = seen.moments.to(down.device)
            plain, sets = [(chosen, None)], [chosen]
            if self._plan is not None:
                # What was better was found out when the plan was made.
                fits = name in self._plan.refitted.get(layer, [])
                plain, sets = ([], sets) if fits else (plain, [])
            elif self.criterion == "saliency":
                sets.append(keep_by_surgery(moments, down, count, seen.tokens))
            choices = plain + [(one, fitted_down(moments, down, one, seen.tokens)) for one in sets]
            held = seen.held_out.to(down.device)
            errors = [
                squared_error(held, down, one, down[:, one] if fitted is None else fitted)
                for one, fitted in choices
            ]
            found = sum_over_ranks(torch.tensor([*errors, output_power(held, down)], dtype=torch.float64))
            best = int(found[:-1].argmin())
            fitted = choices[best][1]
            return choices[best][0], fitted, torch.stack([found[best], found[-1]])

    def _scores(self, layer: int, name: str, expert: nn.Module, seen: ChannelSums | None) -> torch.Tensor:
        """One per channel; the expert's weights are in memory."""
        down = expert.down_proj.weight.detach()
        if self.criterion == "random":
            generator = random.Random(f"{self.seed} {layer} {name}")
            return torch.tensor([generator.random() for _ in range(down.shape[1])])
        if self.criterion == "weight_norm" or seen is None or not seen.tokens:
            rows = [getattr(expert, other, None) for other in ("gate_proj", "up_proj")]
            return magnitude([linear.weight.detach() for linear in rows if linear is not None], down)
        power = seen.power.to(down.device)
        return power if self.criterion == "activation" else saliency(power, down)


def _default_step(width: int) -> int:
    step = _STEP
    while step > 1 and (width % step or width < _FEWEST_STEPS * step):
        step //= 2
    return step
