"""Remove what was bypassed, renumber the rest, and make the config agree with what is there."""

from __future__ import annotations

from collections.abc import Collection

from loguru import logger
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.opened import is_opened
from llmcompressor_moe.surgery.config import describe_layers, keep_blocks, switch_off_mtp
from llmcompressor_moe.surgery.skipped import SkippedMoE
from llmcompressor_moe.topology import Topology, find_topology

__all__ = ["INDEX_NAMES", "remove_blocks", "skip_layers", "sync_config"]

# Attributes that hold a block's own index.
INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number")


def remove_blocks(model: PreTrainedModel, stack: str, dropped: set[int]) -> None:
    """Take blocks out of the stack, renumber the rest (attention's ``layer_idx`` as well) and rewrite the
    config.
    """
    if not dropped:
        return
    parent, _, name = stack.rpartition(".")
    blocks = list(model.get_submodule(stack))
    kept = [index for index in range(len(blocks)) if index not in dropped]
    for new, old in enumerate(kept):
        _renumber(blocks[old], old, new)
    setattr(model.get_submodule(parent), name, nn.ModuleList([blocks[index] for index in kept]))
    keep_blocks(model.config, kept)


def _renumber(block: nn.Module, old: int, new: int) -> None:
    for module in block.modules():
        for name in INDEX_NAMES:
            if module.__dict__.get(name) == old:
                setattr(module, name, new)


def skip_layers(model: PreTrainedModel, topology: Topology, layers: Collection[int]) -> None:
    """Replace MoE layers by modules without parameters that add nothing to the residual stream."""
    for index in layers:
        block = topology.blocks[index]
        moe = model.get_submodule(block.moe.module)
        model.set_submodule(block.moe.module, SkippedMoE.for_module(moe, model.get_submodule(block.name)))


def sync_config(model: PreTrainedModel) -> None:
    """Write into the config what the model's modules are: expert counts, skipped layers, no MTP layers."""
    topology = find_topology(model)
    counts = {index: moe.num_experts for index, moe in topology.moe_layers.items()}
    for block in topology.blocks:
        if any(isinstance(child, SkippedMoE) for child in model.get_submodule(block.name).children()):
            counts[block.index] = 0
    describe_layers(model.config, counts)
    # A model that was opened keeps the files' MTP layers in mind until it is saved.
    for name in () if is_opened(model) else switch_off_mtp(model.config):
        logger.warning(
            f"{name} is set to 0: the multi-token-prediction layers were not loaded, so they could not be "
            f"trimmed like the rest. "
            "Speculative decoding with them is off."
        )
