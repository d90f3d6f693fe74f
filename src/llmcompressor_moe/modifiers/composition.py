"""What our modifiers, and every checkpoint of an MoE model, need of the others in a recipe: asked before anything
runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from compressed_tensors.utils import match_named_modules, match_targets
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from loguru import logger
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.compat.llmcompressor.autoround import tune_with_hooks_off
from llmcompressor_moe.compat.llmcompressor.mappings import (
    awq_mappings,
    smoothquant_mappings,
    upstream_awq_mappings,
    upstream_smoothquant_mappings,
)
from llmcompressor_moe.compat.llmcompressor.pinning import pin_only_with_an_accelerator
from llmcompressor_moe.compat.llmcompressor.wrong_mappings import wrong_mappings
from llmcompressor_moe.families import exception_for
from llmcompressor_moe.quantization.refusals import quantized_linears
from llmcompressor_moe.topology import Topology, find_topology, find_towers, text_config

__all__ = ["check_recipe", "join_recipe"]

# By name: importing the class imports auto_round, which looks for devices and wraps `from_pretrained`.
_AUTO_ROUND = "AutoRoundModifier"
# By name: these modifiers import this module.
_PART_DROPS = ("BlockDropModifier", "LayerDropModifier")
_EXPERT_DROPS = ("ExpertDropModifier", "REAPPruningModifier")
_CHOOSES_SCHEMES = "RouterAwareQuantModifier"


def join_recipe(modifiers: Sequence[Modifier], state: State) -> None:
    """Refuse what cannot work beside our modifiers, and make others fit to stand beside them: smoothing
    modifiers get mappings that suit an MoE, AutoRound keeps its own forward passes to itself.

    Called when one of our modifiers is initialized; a second call finds nothing left to do.

    :param modifiers: all modifiers of the recipe
    :param state: holds the model, experts linearized
    :raises ValueError: see `check_recipe`
    """
    check_recipe(modifiers, state.model)
    for modifier in modifiers:
        if isinstance(modifier, AWQModifier):
            pin_only_with_an_accelerator()
            if _mappings_are_upstreams(modifier, state.model):
                # AWQ takes its mappings up when its calibration starts, whoever was initialized first.
                modifier.mappings = awq_mappings(state.model)
        elif isinstance(modifier, SmoothQuantModifier) and _mappings_are_upstreams(modifier, state.model):
            _leave_moe_layers_out(modifier, state)
        elif type(modifier).__name__ == _AUTO_ROUND:
            tune_with_hooks_off(type(modifier))


def check_recipe(modifiers: Sequence[Modifier], model: PreTrainedModel) -> None:
    """Refuse what cannot work on an MoE model; warn of quantized vision and audio towers.

    :param modifiers: all modifiers of the recipe
    :param model: on any device (meta as well), linearized or not
    :raises ValueError: AutoRound on a model that is not in bfloat16; AWQ or SmoothQuant with llm-compressor's
        own mappings where those change what the model computes; a modifier of llm-compressor that quantizes or
        prunes routers or the gates of shared experts, or quantizes experts of a family of which vLLM cannot serve
        quantized ones; modifiers of llm-compressor that leave some experts in 16 bit where vLLM needs all or none
    """
    topology = find_topology(model)
    quantized: dict[str, str] = {}
    for modifier in modifiers:
        reached = _targeted_linears(modifier, model)
        if not isinstance(modifier, SparsityModifierBase):
            quantized |= dict.fromkeys(reached, type(modifier).__name__)
        _check_routers(modifier, reached, model, topology)
        if not isinstance(modifier, SparsityModifierBase):
            _check_experts(modifier, reached, topology)
        _warn_of_towers(modifier, reached, model, topology)
    _check_experts_left_out(modifiers, quantized, model, topology)
    model_type = text_config(model.config).model_type
    for modifier in modifiers:
        if type(modifier).__name__ == _AUTO_ROUND and model.dtype != torch.bfloat16:
            raise ValueError(
                f"AutoRoundModifier turns the blocks that it tunes into bfloat16 and leaves the rest of the model "
                f"as it is, {model.dtype}: load the model with dtype=torch.bfloat16."
            )
        # Subclasses share their base's mappings: LogarithmicEqualizationModifier is a SmoothQuantModifier.
        kind = next((cls for cls in (AWQModifier, SmoothQuantModifier) if isinstance(modifier, cls)), None)
        reason = wrong_mappings(model_type, kind.__name__) if kind is not None else None
        if reason is not None and _mappings_are_upstreams(modifier, model):
            name = type(modifier).__name__
            raise ValueError(
                f"{name} with llm-compressor's own mappings changes what a {model_type!r} model computes: "
                f"{reason}. Give {name} `mappings` that name every layer that reads the smoothed one."
            )


def _check_routers(
    modifier: Modifier, reached: Sequence[str], model: PreTrainedModel, topology: Topology
) -> None:
    moes = topology.moe_layers.values()
    routers = tuple(f"{moe.router}." for moe in moes if moe.router)
    holders = {moe.module for moe in moes if not moe.inline}
    wrong = [
        name
        for name in reached
        if f"{name}.".startswith(routers)
        or (name.rpartition(".")[0] in holders and model.get_submodule(name).out_features == 1)
    ]
    if wrong:
        tails = dict.fromkeys(re.escape(".".join(name.split(".")[-2:])) for name in wrong)
        # Pruning modifiers of llm-compressor look names up with a dot at the end.
        entries = ", ".join(rf"'re:.*{tail}\.?$'" for tail in tails)
        raise ValueError(
            f"{type(modifier).__name__} targets {len(wrong)} routers or gates of shared experts, {wrong[0]!r} for "
            "one. Readers run them in 16 bit, and their errors send tokens to other experts. Add to its ignore: "
            f"{entries}."
        )


def _check_experts(modifier: Modifier, reached: Sequence[str], topology: Topology) -> None:
    reason = exception_for(topology.model_type).refuse_quantized_experts
    if reason is None:
        return
    for moe in topology.moe_layers.values():
        others = tuple(f"{shared}." for shared in moe.shared_experts)
        expert = next(
            (n for n in reached if n.startswith(f"{moe.module}.") and not n.startswith(others)), None
        )
        if expert is not None:
            raise ValueError(
                f"{type(modifier).__name__} targets experts, {expert!r} for one, and vLLM cannot serve quantized "
                f"experts of {topology.model_type!r}: {reason}. Add 're:.*experts.*' to its ignore."
            )


def _check_experts_left_out(
    modifiers: Sequence[Modifier],
    quantized: Mapping[str, str],
    model: PreTrainedModel,
    topology: Topology,
) -> None:
    """Refuse schemes for some experts of a layer, and for those of some layers where a family allows none.

    :param quantized: path of a Linear -> name of the modifier that quantizes it
    """
    kinds = {type(modifier).__name__ for modifier in modifiers}
    dropped = {index for modifier in modifiers for index in _named_parts(modifier)}
    plain: list[int] = []
    covered: list[int] = []
    for index, moe in topology.moe_layers.items():
        if index in dropped:
            continue
        linears = [
            f"{moe.experts}.{name}"
            for name, module in model.get_submodule(moe.experts).named_modules()
            if isinstance(module, nn.Linear)
        ]
        left_out = [name for name in linears if name not in quantized]
        (covered if len(left_out) < len(linears) else plain).append(index)
        # A drop may take the experts that are left out.
        if left_out and len(left_out) < len(linears) and kinds.isdisjoint(_EXPERT_DROPS):
            modifier = next(quantized[name] for name in linears if name in quantized)
            raise ValueError(
                f"{modifier} quantizes some experts of block {index} and leaves {len(left_out)} of their Linears "
                f"in 16 bit, {left_out[0]!r} for one; vLLM runs a layer's experts as one. Let its targets and "
                f"ignore cover all of them or none ('re:.*{re.escape(moe.experts)}.*')."
            )
    reason = exception_for(topology.model_type).refuse_partly_quantized
    if reason and plain and covered and _CHOOSES_SCHEMES not in kinds:
        experts = topology.moe_layers[covered[0]].experts
        modifier = next(kind for name, kind in quantized.items() if name.startswith(f"{experts}."))
        raise ValueError(
            f"{modifier} quantizes the experts of blocks {covered} and leaves those of blocks {plain} in 16 bit, "
            f"which vLLM cannot serve for {topology.model_type!r}: {reason}. Let its targets and ignore cover the "
            "experts of all blocks or of none ('re:.*experts.*')."
        )


def _named_parts(modifier: Modifier) -> Sequence[int]:
    """Blocks or MoE layers that a modifier drops, where the recipe names them."""
    if type(modifier).__name__ not in _PART_DROPS:
        return ()
    return getattr(modifier, "blocks", None) or getattr(modifier, "layers", None) or ()


def _warn_of_towers(
    modifier: Modifier, reached: Sequence[str], model: PreTrainedModel, topology: Topology
) -> None:
    for tower in find_towers(model, topology):
        inside = sum(f"{name}.".startswith(f"{tower}.") for name in reached)
        if inside:
            logger.warning(
                f"{type(modifier).__name__} targets {inside} Linears of {tower!r}, which stands beside the text "
                f"model. To leave them as they are, add 're:{re.escape(tower)}.*' to its ignore."
            )


def _targeted_linears(modifier: Modifier, model: PreTrainedModel) -> list[str]:
    """Paths of the Linears that one of llm-compressor's modifiers quantizes or prunes."""
    if not isinstance(modifier, SparsityModifierBase):
        return quantized_linears(modifier, model)
    targets = [modifier.targets] if isinstance(modifier.targets, str) else modifier.targets
    return [
        f"{name}.{inside}".removesuffix(".")
        for name, module in match_named_modules(model, targets)
        for inside, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and not match_targets(f"{name}.{inside}", linear, modifier.ignore)
    ]


def _mappings_are_upstreams(modifier: AWQModifier | SmoothQuantModifier, model: PreTrainedModel) -> bool:
    infer = upstream_awq_mappings if isinstance(modifier, AWQModifier) else upstream_smoothquant_mappings
    return modifier.mappings is None or list(modifier.mappings) == list(infer(model))


def _leave_moe_layers_out(modifier: SmoothQuantModifier, state: State) -> None:
    mappings = smoothquant_mappings(state.model)
    left_out = len(upstream_smoothquant_mappings(state.model)) - len(mappings)
    if not left_out:
        return
    logger.warning(
        f"SmoothQuantModifier: {left_out} of its mappings reach into MoE layers and are left out; one scale per "
        "channel serves no expert, and would change routing."
    )
    modifier.mappings = mappings
    if modifier.initialized_:
        # SmoothQuant takes its mappings up when it is initialized, and this one was before us.
        modifier.on_initialize(state)
