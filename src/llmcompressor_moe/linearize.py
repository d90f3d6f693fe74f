"""Widen llm-compressor's linearization of experts where it stops short of a model that it otherwise supports."""

from __future__ import annotations

import copy
from types import SimpleNamespace

from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

__all__ = ["register_linearizations"]


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
