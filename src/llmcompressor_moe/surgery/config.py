"""Make a config say what the model has become: every field that counts or lists blocks, MoE layers or
experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from llmcompressor_moe.compat.transformers.per_layer import (
    allow_global_access,
    layer_overrides,
    says_that_none_differs,
)
from llmcompressor_moe.families import MTP_COUNTS, MTP_SWITCHES
from llmcompressor_moe.topology import expert_count_attributes, text_config

__all__ = [
    "describe_layers",
    "describe_widths",
    "keep_blocks",
    "per_layer_overrides",
    "set_expert_count",
    "switch_off_mtp",
]

# Lists of block indices (every other list with one entry per block is a list of per-block values).
_INDEX_LISTS = {"mlp_only_layers", "moe_layers", "attention_layers", "full_attn_idxs", "attn_layer_indices"}
# The first n blocks differ from the rest.
_PREFIX_COUNTS = {
    "first_k_dense_replace",
    "num_dense_layers",
    "n_dense_layers",
    "max_window_layers",
    "num_hash_layers",
    "moe_layer_start_index",
}
# Inclusive index of the last block of a range.
_LAST_INDICES = {"moe_layer_end_index"}
_BLOCK_COUNT = "num_hidden_layers"
_NOT_PER_BLOCK = re.compile(r"token|section|architectures|keys_to_ignore|^rope_|labels|languages")


def keep_blocks(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Rewrite the text config, in place, for the blocks ``kept``.

    :param kept: indices of the blocks that stay, in order, in today's numbering
    """
    config = text_config(config)
    count_name = config.attribute_map.get(_BLOCK_COUNT, _BLOCK_COUNT)
    old_count = getattr(config, count_name)
    overrides, alike = per_layer_overrides(config), says_that_none_differs(config)
    config.per_layer_config = None
    new_index = {old: new for new, old in enumerate(kept)}
    moe_indices = _periodic_moe_layers(config)
    for name, value in list(config.__dict__.items()):
        if name == count_name or name.startswith("_") or _NOT_PER_BLOCK.search(name):
            continue
        new = _rewrite(name, value, old_count, kept, new_index)
        if new is not value:
            config.__dict__[name] = new
    if moe_indices is not None and old_count != len(kept):
        # A period no longer describes the stack; the list of dense blocks does.
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [new for old, new in new_index.items() if old not in moe_indices]
    setattr(config, count_name, len(kept))
    moved = {new_index[old]: layer for old, layer in overrides.items() if old in new_index}
    if moved or alike:
        config.per_layer_config = moved


def _rewrite(name: str, value: Any, old_count: int, kept: Sequence[int], new_index: Mapping[int, int]) -> Any:
    if name in _INDEX_LISTS and isinstance(value, list | tuple):
        return type(value)(new_index[index] for index in value if index in new_index)
    if name in _PREFIX_COUNTS and isinstance(value, int) and not isinstance(value, bool):
        return sum(index < value for index in kept)
    if name in _LAST_INDICES and isinstance(value, int) and value >= 0:
        return sum(index <= value for index in kept) - 1
    if isinstance(value, list | tuple) and len(value) == old_count:
        return type(value)(value[index] for index in kept)
    return value


def _periodic_moe_layers(config: PreTrainedConfig) -> set[int] | None:
    """MoE blocks where every n-th block is one (Qwen2-MoE, Qwen3-MoE): None unless n is more than 1."""
    step = getattr(config, "decoder_sparse_step", None)
    if not isinstance(step, int) or step <= 1 or getattr(config, "mlp_only_layers", None) is None:
        return None
    return {
        index
        for index in range(config.num_hidden_layers)
        if (index + 1) % step == 0 and index not in config.mlp_only_layers
    }


def per_layer_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """What a text config says of single layers: block index -> attribute -> value; empty if nothing."""
    return layer_overrides(text_config(config))


def describe_layers(config: PreTrainedConfig, expert_counts: Mapping[int, int | None]) -> None:
    """Write expert counts and skipped MoE layers into the text config, in place.

    The same count everywhere and nothing skipped is a plain field. Otherwise the largest count becomes the
    global value and ``per_layer_config`` names the layers that differ. A skipped MoE layer gets ``skip:
    ["mlp"]`` and the count 0: the count makes the attribute a per-layer one, so that a reader which does not
    know the format fails instead of filling the layer with random weights.

    :param expert_counts: block index -> number of experts, 0 for a skipped MoE layer; dense blocks are left
        out
    """
    config = text_config(config)
    names = expert_count_attributes(config)
    overrides, alike = per_layer_overrides(config), says_that_none_differs(config)
    config.per_layer_config = None
    for layer in overrides.values():
        layer.pop("skip", None)
        for name in names:
            layer.pop(name, None)
    largest = max(expert_counts.values(), default=0)
    set_expert_count(config, largest)
    for index, count in expert_counts.items():
        if count != largest:
            layer = overrides.setdefault(index, {})
            layer.update(dict.fromkeys(names, count))
            if count == 0:
                layer["skip"] = ["mlp"]
    overrides = {index: layer for index, layer in sorted(overrides.items()) if layer}
    if overrides or alike:
        config.per_layer_config = overrides
    if overrides:
        # The rest of a loaded model (load balancing, generation) may read the global value.
        allow_global_access(config)


def describe_widths(config: PreTrainedConfig, fields: Mapping[int, Mapping[str, int]]) -> None:
    """Write widths of experts into the text config, in place.

    The same for all layers are plain fields; otherwise ``per_layer_config`` names the layers that differ from what
    the config says.

    :param fields: block index -> field -> value, for every MoE layer; empty for a layer that stays as it is
    """
    config = text_config(config)
    first = next(iter(fields.values()))
    if all(layer == first for layer in fields.values()):
        for name, value in first.items():
            setattr(config, name, value)
        return
    overrides = per_layer_overrides(config)
    for index, layer in fields.items():
        if layer:
            overrides.setdefault(index, {}).update(layer)
    config.per_layer_config = dict(sorted(overrides.items()))
    # The rest of a loaded model may read the general value.
    allow_global_access(config)


def set_expert_count(config: PreTrainedConfig, count: int) -> None:
    """Write one expert count for all layers into the text config, in place."""
    config = text_config(config)
    for name in expert_count_attributes(config):
        value = getattr(config, name)
        setattr(config, name, [count] * len(value) if isinstance(value, list) else count)


def switch_off_mtp(config: PreTrainedConfig) -> list[str]:
    """Set the number of multi-token-prediction layers to 0; return the fields that were on.

    transformers does not load those layers, so they cannot be trimmed with the rest; left as they are they
    would contradict it.
    """
    config = text_config(config)
    names = dict.fromkeys(config.attribute_map.get(name, name) for name in (*MTP_COUNTS, *MTP_SWITCHES))
    switched = [name for name in names if getattr(config, name, None)]
    for name in switched:
        setattr(config, name, type(getattr(config, name))())
    return switched
