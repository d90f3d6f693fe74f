"""What our modifiers need of the others in their recipe: asked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from loguru import logger
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
from llmcompressor_moe.topology import text_config

__all__ = ["check_recipe", "join_recipe"]

# By name: importing the class imports auto_round, which looks for devices and wraps `from_pretrained`.
_AUTO_ROUND = "AutoRoundModifier"


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
    """Refuse what cannot work beside our modifiers.

    :param modifiers: all modifiers of the recipe
    :raises ValueError: AutoRound on a model that is not in bfloat16; AWQ or SmoothQuant with llm-compressor's
        own mappings where those change what the model computes
    """
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
