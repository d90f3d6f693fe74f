"""The LM head, which llm-compressor takes out while it calibrates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from compressed_tensors.utils import patch_attr
from llmcompressor.utils.helpers import disable_lm_head
from transformers import PreTrainedModel

__all__ = ["lm_head_in_place"]


@contextlib.contextmanager
def lm_head_in_place(model: PreTrainedModel) -> Iterator[None]:
    """Context in which a model's LM head works.

    llm-compressor's sequential pipeline takes it out until its pass is over, and recipes end within it. Nothing
    says so but the name of the function in its place.
    """
    head = model.get_output_embeddings()
    if disable_lm_head.__name__ not in getattr(head.forward, "__qualname__", ""):
        yield
        return
    with patch_attr(head, "forward", type(head).forward.__get__(head)):
        yield
