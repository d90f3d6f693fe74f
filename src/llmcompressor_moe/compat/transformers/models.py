"""What transformers' models keep to themselves."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

__all__ = ["can_choose_experts", "checkpointing_function"]


def can_choose_experts(model: PreTrainedModel) -> bool:
    """Whether a model takes ``set_experts_implementation``, which raises where it does not."""
    return model._can_set_experts_implementation()


def checkpointing_function(module: nn.Module) -> Any:
    """The function that a module checkpoints its activations with, a ``functools.partial``; None without any.

    ``gradient_checkpointing_enable`` hides the keywords in it that were asked for.
    """
    return getattr(module, "_gradient_checkpointing_func", None)
