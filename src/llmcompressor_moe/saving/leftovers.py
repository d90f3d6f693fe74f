"""Stored tensors that no parameter of the model is made of: kept, moved with their block, or left out with it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from llmcompressor_moe.checkpoint.opened import OpenedCheckpoint, opened_module
from llmcompressor_moe.saving.shards import OutputTensor
from llmcompressor_moe.saving.tensors import copied

__all__ = ["block_numbers", "leftover_tensors"]


def block_numbers(model: nn.Module, opened: OpenedCheckpoint) -> dict[int, int]:
    """Index of a block when the model was opened -> its index now, for those that are left."""
    found = {}
    for now, block in enumerate(model.get_submodule(opened.stack)):
        origin = opened_module(block)
        if origin is not None:
            found[int(origin.path.rpartition(".")[2])] = now
    return found


def leftover_tensors(model: nn.Module, opened: OpenedCheckpoint) -> Iterator[OutputTensor]:
    """The tensors that a checkpoint holds beside those of the model."""
    moved = block_numbers(model, opened)
    pattern = re.compile(rf"^({re.escape(opened.stored_stack)}\.)(\d+)(\..+)$")
    for name in sorted(opened.unused):
        for part in opened.logical[name].parts:
            place = pattern.match(part)
            if place is None:
                yield copied(opened.stored, part, part)
                continue
            old = int(place[2])
            new = moved.get(old) if old < opened.num_blocks else len(moved) + old - opened.num_blocks
            if new is not None:
                yield copied(opened.stored, part, f"{place[1]}{new}{place[3]}")
