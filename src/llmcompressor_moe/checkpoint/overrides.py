"""What a config's ``per_layer_config`` says about the MoE layers, read and judged without a model."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from llmcompressor_moe.compat.transformers.per_layer import layer_overrides, tolerant_lookups
from llmcompressor_moe.topology import expert_count_attributes, expert_width_attributes

__all__ = ["SKIPPABLE", "MoEOverride", "moe_overrides", "tolerant_configs"]

SKIPPABLE = "mlp"


@dataclass(frozen=True)
class MoEOverride:
    """How one layer's MoE differs from the config's general words.

    :param skipped: the layer has no MoE
    :param counts: attribute that counts experts (canonical name) -> experts of this layer
    :param widths: attribute that says how wide experts are -> channels of this layer's
    """

    skipped: bool
    counts: dict[str, int]
    widths: dict[str, int] = field(default_factory=dict)


def moe_overrides(config: PreTrainedConfig) -> dict[int, MoEOverride]:
    """Layer index -> override, for the layers whose MoE was dropped, or has another number of experts, or experts
    of another width.

    Empty for configs whose layers are all alike, or differ in other things only (Gemma 4's attention does).

    :param config: a text config; of a config with parts, its text config
    :raises ValueError: a part other than the MoE is to be skipped, or a count of experts or their width is not a
        whole number above 0
    """
    overrides = layer_overrides(config)
    if not overrides:
        return {}
    attributes = expert_count_attributes(config)
    found = {}
    for index, values in overrides.items():
        skip = values.get("skip", [])
        unknown = sorted(set(skip) - {SKIPPABLE})
        if unknown:
            raise ValueError(
                f'per_layer_config["{index}"].skip names {unknown}; only "{SKIPPABLE}" (the MoE layer) can '
                "be skipped here. Remove the other entries, or use a reader that knows them."
            )
        counts = {name: values[name] for name in attributes if name in values}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < (0 if skip else 1):
                raise ValueError(
                    f'per_layer_config["{index}"].{name} is {count!r}; it must be a whole number above 0, '
                    f'or 0 together with "skip": ["{SKIPPABLE}"] where the MoE layer was dropped.'
                )
        widths = {name: values[name] for name in expert_width_attributes(config) if name in values}
        for name, width in widths.items():
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ValueError(
                    f'per_layer_config["{index}"].{name} is {width!r}; it must be a whole number above 0.'
                )
        if skip or counts or widths:
            found[index] = MoEOverride(bool(skip), counts, widths)
    return found


def tolerant_configs() -> contextlib.AbstractContextManager[None]:
    """Context in which config classes, and the models built from them, take configs whose MoE layers differ."""
    return tolerant_lookups(_without_moe_overrides)


def _without_moe_overrides(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config in which all MoE layers are alike, or the config itself where they are."""
    overrides = moe_overrides(config)
    if not overrides:
        return config
    plain = copy.copy(config)
    said = {name for override in overrides.values() for name in {**override.counts, **override.widths}}
    plain.per_layer_config = {
        index: {name: value for name, value in values.items() if name not in {*said, "skip"}}
        for index, values in layer_overrides(config).items()
    }
    return plain
