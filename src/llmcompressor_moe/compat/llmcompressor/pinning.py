"""Let AWQ run on a machine without an accelerator.

llm-compressor 0.14 pins cached activations in memory for faster copies to a GPU, whether there is one or not;
without one torch refuses.
"""

from __future__ import annotations

import functools

import torch
from llmcompressor.pipelines.cache import IntermediatesCache

__all__ = ["pin_only_with_an_accelerator"]


def pin_only_with_an_accelerator() -> None:
    """Make `IntermediatesCache.pin_memory` do nothing on a machine that has no accelerator."""
    pin_memory = IntermediatesCache.pin_memory
    if hasattr(pin_memory, "__wrapped__"):
        return

    @functools.wraps(pin_memory)
    def guarded(cache: IntermediatesCache, batch_index: int, input_names: list[str] | None = None) -> None:
        if torch.accelerator.is_available():
            pin_memory(cache, batch_index, input_names)

    IntermediatesCache.pin_memory = guarded
