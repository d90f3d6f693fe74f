"""Stored tensors that no parameter of the model is made of: kept, moved with their block, or left out with it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from llmcompressor_moe.checkpoint.opened import OpenedCheckpoint, opened_module
from llmcompressor_moe.saving.mtp import MtpPlan, cut_tensor, is_mtp
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


def leftover_tensors(model: nn.Module, opened: OpenedCheckpoint, mtp: MtpPlan) -> Iterator[OutputTensor]:
    """The tensors that a checkpoint holds beside those of the model.

    :param mtp: what becomes of multi-token-prediction layers
    """
    moved = block_numbers(model, opened)
    pattern = re.compile(rf"^({re.escape(opened.stored_stack)}\.)(\d+)(\..+)$")
    for name in sorted(opened.unused):
        of_mtp = is_mtp(name, opened)
        if of_mtp and not mtp.keep:
            continue
        for part in opened.logical[name].parts:
            place = pattern.match(part)
            target = part
            if place is not None:
                old = int(place[2])
                new = moved.get(old) if old < opened.num_blocks else len(moved) + old - opened.num_blocks
                if new is None:
                    continue
                target = f"{place[1]}{new}{place[3]}"
            yield from (
                cut_tensor(mtp, opened, part, target) if of_mtp else [copied(opened.stored, part, target)]
            )
