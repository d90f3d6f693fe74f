"""What llm-compressor refuses to compress."""

from __future__ import annotations

import functools
from collections.abc import Callable

from llmcompressor.entrypoints.oneshot import Oneshot
from transformers import PreTrainedModel

__all__ = ["accept_decoded_models"]

_MARK = "_accepts_decoded_models"


def accept_decoded_models(is_decoded: Callable[[PreTrainedModel], bool]) -> None:
    """Let `oneshot` run on models whose weights are decoded although their files are quantized.

    It looks into the config.json that a model came from, and refuses every method but its own there.

    :param is_decoded: whether a model computes with plain weights, whatever its files say
    """
    original = Oneshot.validate_model
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def validate_model(self: Oneshot, model: PreTrainedModel) -> None:
        if not is_decoded(model):
            original(self, model)

    setattr(validate_model, _MARK, True)
    Oneshot.validate_model = validate_model
