"""What config.json says of stored precisions that a recipe kept: the same, in the numbers that blocks and experts
have now.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from compressed_tensors.utils import match_name
from torch import nn

from llmcompressor_moe.checkpoint.config_parts import QUANTIZATION, quantized_parts
from llmcompressor_moe.checkpoint.opened import OpenedCheckpoint, opened_module
from llmcompressor_moe.checkpoint.quantized_names import patterns_for, stack_pattern
from llmcompressor_moe.saving.leftovers import block_numbers
from llmcompressor_moe.saving.tensors import moved_name

__all__ = ["describe_stored_quantization"]

# Lists of module names or patterns, by quantization method.
_LISTS = ("ignore", "modules_to_not_convert", "ignored_layers")
_MOST_MTP_LAYERS = 64


def describe_stored_quantization(config: dict[str, Any], model: nn.Module, opened: OpenedCheckpoint) -> None:
    """Bring a config's ``quantization_config`` up to date, in place; remove it where weights are written decoded.

    :param config: fields of config.json as they were stored
    """
    if opened.quantization is None:
        return
    for part in quantized_parts(config):
        if opened.requantize:
            del part[QUANTIZATION]
            continue
        fields = part[QUANTIZATION]
        moves = _moves(model, opened)
        left = block_numbers(model, opened)
        # Blocks after the last one, which MTP layers are, move up.
        after = range(opened.num_blocks, opened.num_blocks + _MOST_MTP_LAYERS)
        blocks = (
            dict.fromkeys(range(opened.num_blocks))
            | left
            | {index: index + len(left) - opened.num_blocks for index in after}
        )
        stacks = {opened.stack, opened.stored_stack}
        for name in _LISTS:
            if fields.get(name):
                fields[name] = _moved(fields[name], moves, blocks, stacks)
        for group in (fields.get("config_groups") or {}).values():
            group["targets"] = _moved(group["targets"], moves, blocks, stacks)


def _moves(model: nn.Module, opened: OpenedCheckpoint) -> dict[str, str | None]:
    """Stored name of a module -> its name now, None if it is gone."""
    moves: dict[str, str | None] = {
        name.rpartition(".")[0]: None for name in opened.logical if name not in opened.unused
    }
    for path, module in model.named_modules():
        origin = opened_module(module)
        for source in origin.sources.values() if origin else ():
            for leaf in source.leaves():
                stored = leaf.name.rpartition(".")[0]
                moves[stored] = moved_name(stored, origin.path, path)
    return moves


def _moved(
    entries: list[str],
    moves: Mapping[str, str | None],
    blocks: Mapping[int, int | None],
    stacks: Collection[str],
) -> list[str]:
    found: list[str] = []
    in_block = re.compile(rf"({stack_pattern(stacks)}\.)(\d+)(\..+)?")
    for entry in entries:
        if entry.startswith("re:"):
            found += _moved_pattern(entry, moves, stacks)
        elif entry in moves:
            found += [moves[entry]] if moves[entry] is not None else []
        else:
            place = in_block.fullmatch(entry)
            block = blocks.get(int(place[2]), place[2]) if place else None
            if place is None:
                found.append(entry)
            elif block is not None:
                found.append(f"{place[1]}{block}{place[3] or ''}")
    return list(dict.fromkeys(found))


def _moved_pattern(entry: str, moves: Mapping[str, str | None], stacks: Collection[str]) -> list[str]:
    """A pattern that matches the modules that this one matched; itself where it still does."""
    before = {moves[name] for name in moves if match_name(name, entry)} - {None}
    after = {name for name in moves.values() if name is not None and match_name(name, entry)}
    if before == after:
        return [entry]
    everything = [name for name in moves.values() if name is not None]
    return patterns_for(sorted(before), everything, stacks)
