"""Widen llm-compressor's linearization of experts where it stops short of a model it supports otherwise."""

from __future__ import annotations

import copy
from types import SimpleNamespace

from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    _build_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

__all__ = ["register_linearizations", "restore_checkpoint_names"]


class _Llama4TextLinearExperts(Llama4LinearExperts):
    """Also for a text-only Llama 4, and for a layer whose expert count differs from the config's."""

    @classmethod
    def from_experts_module(cls, experts: nn.Module, config: PreTrainedConfig) -> LinearExperts2D:
        text = copy.copy(getattr(config, "text_config", config))
        text.__dict__.pop("_heterogeneity_spec", None)
        text.num_local_experts = experts.num_experts
        linear = super().from_experts_module(experts, SimpleNamespace(text_config=text))
        linear._source_experts_cls = type(experts)
        return linear


def register_linearizations() -> None:
    """Make `oneshot` use the classes of this module."""
    LinearExperts2D._registry[Llama4TextExperts] = _Llama4TextLinearExperts


def restore_checkpoint_names(model: PreTrainedModel, *, fused: bool) -> None:
    """Undo what `load_quantizable_moe` leaves behind: transformers' table of checkpoint names changed for a
    whole family.

    Every other model of the family that this process loads or saves would miss its experts.

    :param fused: whether the model's experts are fused again, so that it has to save by the restored names,
        too
    """
    model_type = model.config.model_type
    original = _build_checkpoint_conversion_mapping().get(model_type)
    if original is not None:
        register_checkpoint_conversion_mapping(model_type, original, overwrite=True)
    if fused:
        model._weight_conversions = get_model_conversion_mapping(model)
