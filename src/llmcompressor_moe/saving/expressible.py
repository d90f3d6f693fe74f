"""Whether a config can describe the model that a drop would leave: asked before anything is cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from llmcompressor_moe.checkpoint.reader import load_trimmed_moe
from llmcompressor_moe.compat.transformers.building import build
from llmcompressor_moe.families import exception_for
from llmcompressor_moe.surgery.compact import INDEX_NAMES
from llmcompressor_moe.surgery.config import keep_blocks
from llmcompressor_moe.surgery.skipped import SkippedMoE
from llmcompressor_moe.topology import text_config

__all__ = ["ConfigCannotSayError", "check_blocks_can_go"]


class ConfigCannotSayError(ValueError):
    """The architecture's config has no way to describe the model that a drop would leave."""


def check_blocks_can_go(model: PreTrainedModel, stack: str, dropped: set[int]) -> None:
    """Make sure that the config can describe the model without these blocks, without touching the model.

    The model that the new config builds (on the meta device) must have, block by block, the modules, shapes
    and settings of the blocks that stay: a sliding-window pattern that is a period, say, no longer fits after
    one block is gone.

    :raises ConfigCannotSayError: names the first block and setting that would come out different
    """
    config = copy.deepcopy(model.config)
    blocks = list(model.get_submodule(stack))
    kept = [index for index in range(len(blocks)) if index not in dropped]
    _check_positions(text_config(config).model_type, kept, dropped)
    keep_blocks(config, kept)
    _check_cache(model.config, config, dropped)
    text_config(config).use_cache = True
    with load_trimmed_moe(), torch.device("meta"):
        twin = build(type(model), config)
    for new, old in enumerate(kept):
        theirs, ours = _settings(twin.get_submodule(stack)[new]), _settings(blocks[old])
        for key in sorted(theirs):
            if key in ours and theirs[key] != ours[key]:
                raise ConfigCannotSayError(
                    f"Blocks {sorted(dropped)} cannot be dropped from a {text_config(config).model_type!r} "
                    f"model: block {old} would become "
                    f"block {new}, where its config makes {key} = {theirs[key]!r} instead of "
                    f"{ours.get(key)!r}. Choose other blocks "
                    "(`protect`, `blocks`) so that the pattern stays whole."
                )


def _check_positions(model_type: str, kept: list[int], dropped: set[int]) -> None:
    period = exception_for(model_type).position_period
    for new, old in enumerate(kept):
        if (old - new) % period:
            raise ConfigCannotSayError(
                f"Blocks {sorted(dropped)} cannot be dropped from a {model_type!r} model: vLLM takes a block's "
                f"kind of attention from its index modulo {period}, and block {old} would become block {new}. "
                f"Drop neighbouring blocks in multiples of {period}: pattern='consecutive' with such a "
                "num_drop, or name the blocks."
            )


def _check_cache(before: PreTrainedConfig, after: PreTrainedConfig, dropped: set[int]) -> None:
    """Hybrids ask their cache for its length, which only blocks with attention over all tokens know."""
    if _knows_its_length(before) and not _knows_its_length(after):
        name = text_config(before).model_type
        raise ConfigCannotSayError(
            f"Blocks {sorted(dropped)} cannot be dropped from a {name!r} model: no block would be left that keeps "
            "keys and values, and its class does not run without one. Keep one of these blocks (`protect`, "
            "`blocks`)."
        )


def _knows_its_length(config: PreTrainedConfig) -> bool:
    try:
        DynamicCache(config=text_config(config)).get_seq_length()
    except ValueError:
        return False
    return True


def _settings(block: nn.Module) -> dict[str, object]:
    """Plain settings and parameter shapes of a block, its experts and skipped layers left out."""
    found: dict[str, object] = {}
    for path, module in _outside_experts(block):
        if not type(module).__module__.startswith("llmcompressor."):
            # Upstream puts norms of its own in place while it calibrates.
            found[path] = type(module).__name__
        for name, value in module.__dict__.items():
            if (
                isinstance(value, bool | int | float | str)
                and not name.startswith("_")
                and name not in INDEX_NAMES
            ):
                found[f"{path}.{name}"] = value
    ignored = ("training", "num_experts", "num_local_experts", "n_routed_experts", "out_features")
    return {key: value for key, value in found.items() if not key.endswith(ignored)}


def _outside_experts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module.named_children():
        is_experts = isinstance(child, LinearExperts2D) or name == "experts"
        if not is_experts and not isinstance(child, SkippedMoE):
            yield from _outside_experts(child, f"{path}.{name}" if path else name)
