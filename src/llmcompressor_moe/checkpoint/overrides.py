"""What a config's ``per_layer_config`` says about the MoE layers, read and judged without a model."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import (
    HeterogeneousConfigMixin,
    _PerLayerConfigView,
)

from llmcompressor_moe.topology import expert_count_attributes

__all__ = ["SKIPPABLE", "MoEOverride", "moe_overrides", "tolerant_configs"]

SKIPPABLE = "mlp"


@dataclass(frozen=True)
class MoEOverride:
    """How one layer's MoE differs from the config's general words.

    :param skipped: the layer has no MoE
    :param counts: attribute that counts experts (canonical name) -> experts of this layer
    """

    skipped: bool
    counts: dict[str, int]


def moe_overrides(config: PreTrainedConfig) -> dict[int, MoEOverride]:
    """Layer index -> override, for the layers whose MoE was dropped or has another number of experts.

    Empty for configs whose layers are all alike, or differ in other things only (Gemma 4's attention does).

    :param config: a text config; of a config with parts, its text config
    :raises ValueError: a part other than the MoE is to be skipped, or a count of experts is no whole number
        above 0
    """
    if not config.is_heterogeneous:
        return {}
    attributes = expert_count_attributes(config)
    found = {}
    for index, values in config._heterogeneity_spec.per_layer_overrides.items():
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
        if skip or counts:
            found[index] = MoEOverride(bool(skip), counts)
    return found


@contextlib.contextmanager
def tolerant_configs() -> Iterator[None]:
    """Context in which config classes, and the models built from them, take configs whose MoE layers differ.

    Some config classes check the number of experts before anybody could give permission to read it, and Gemma
    4 looks up the config of a kind of attention layers, which must not differ in anything for that.
    """
    permission = HeterogeneousConfigMixin.allow_global_per_layer_attribute_access
    lookup = _PerLayerConfigView.__getitem__
    HeterogeneousConfigMixin.allow_global_per_layer_attribute_access = property(
        lambda _: True, permission.fset
    )
    _PerLayerConfigView.__getitem__ = functools.wraps(lookup)(
        lambda view, key: lookup(_without_moe_overrides(view) if isinstance(key, str) else view, key)
    )
    try:
        yield
    finally:
        HeterogeneousConfigMixin.allow_global_per_layer_attribute_access = permission
        _PerLayerConfigView.__getitem__ = lookup


def _without_moe_overrides(view: _PerLayerConfigView) -> _PerLayerConfigView:
    """The same view of a copy of the config in which all MoE layers are alike."""
    overrides = moe_overrides(view._config)
    if not overrides:
        return view
    plain = copy.copy(view._config)
    counts = {name for override in overrides.values() for name in override.counts}
    layers = view._config._heterogeneity_spec.per_layer_overrides
    plain.per_layer_config = {
        index: {name: value for name, value in values.items() if name not in {*counts, "skip"}}
        for index, values in layers.items()
    }
    return _PerLayerConfigView(plain)
