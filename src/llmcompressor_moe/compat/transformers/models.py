"""What transformers' models keep to themselves."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

__all__ = ["can_choose_experts", "checkpointing_function", "complete_configs"]

# The token that begins an image. The forward of Qwen3-Omni's thinker asks its config for it whenever it gets an
# attention mask, text alone included; transformers 5.17 gives the field to the talker's config only.
_VISION_START = 151652


def can_choose_experts(model: PreTrainedModel) -> bool:
    """Whether a model takes ``set_experts_implementation``, which raises where it does not."""
    return model._can_set_experts_implementation()


def checkpointing_function(module: nn.Module) -> Any:
    """The function that a module checkpoints its activations with, a ``functools.partial``; None without any.

    ``gradient_checkpointing_enable`` hides the keywords in it that were asked for.
    """
    return getattr(module, "_gradient_checkpointing_func", None)


def complete_configs() -> None:
    """Give config classes the fields that their models read and that they lack, where a config.json names none.

    They become attributes of the class: nothing writes them to a config.json.
    """
    if not hasattr(Qwen3OmniMoeThinkerConfig, "vision_start_token_id"):
        Qwen3OmniMoeThinkerConfig.vision_start_token_id = _VISION_START
