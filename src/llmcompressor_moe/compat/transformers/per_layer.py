"""Configs whose layers differ (``per_layer_config``)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import (
    HeterogeneousConfigMixin,
    _PerLayerConfigView,
)

__all__ = [
    "allow_global_access",
    "general_value",
    "has_general_value",
    "layer_overrides",
    "says_that_none_differs",
    "tolerant_lookups",
]


def general_value(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """What a config says of an attribute in general, whether or not layers override it.

    Plain access raises where a layer does, and permission to read would have to be given to the config itself.
    """
    return config._getattr_without_heterogeneous_validation(name, default)


def has_general_value(config: PreTrainedConfig, name: str) -> bool:
    """Whether a config has an attribute, whether or not layers override it; see `general_value`."""
    return config._hasattr_without_heterogeneous_validation(name)


def layer_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """What a text config says of single layers: block index -> attribute -> value; empty if nothing.

    The property ``per_layer_config`` returns whole configs only, in which an override looks like any value.
    """
    spec = config.__dict__.get("_heterogeneity_spec")
    return {index: dict(layer) for index, layer in spec.per_layer_overrides.items()} if spec else {}


def says_that_none_differs(config: PreTrainedConfig) -> bool:
    """Whether ``per_layer_config`` is there and empty, which `layer_overrides` cannot tell from its absence.

    Without it some classes (Gemma 4) derive differences from older fields.
    """
    spec = config.__dict__.get("_heterogeneity_spec")
    return spec is not None and not spec.per_layer_overrides


def allow_global_access(config: PreTrainedConfig) -> None:
    """Let code that knows nothing of differing layers read the general value, in memory only.

    transformers writes the permission to config.json. It must not be in a file: a reader that does not know the
    format has to fail.

    :param config: a text config with differing layers
    """
    _keep_permission_out_of_files()
    config.allow_global_per_layer_attribute_access = True


def _keep_permission_out_of_files() -> None:
    original = HeterogeneousConfigMixin._update_heterogeneous_to_dict_output
    if getattr(original, "_drops_permission", False):
        return

    @functools.wraps(original)
    def update(self: PreTrainedConfig, d: dict[str, Any]) -> None:
        original(self, d)
        d.pop("allow_global_per_layer_attribute_access", None)

    # Stays for good: configs with the permission outlive whoever gave it.
    update._drops_permission = True
    HeterogeneousConfigMixin._update_heterogeneous_to_dict_output = update


@contextlib.contextmanager
def tolerant_lookups(plain: Callable[[PreTrainedConfig], PreTrainedConfig]) -> Iterator[None]:
    """Context in which config classes, and the models built from them, take configs whose MoE layers differ.

    Some config classes check the number of experts before anybody could give permission to read it. Gemma 4
    looks up the config of a kind of attention layers, which transformers refuses unless they are alike in
    everything.

    :param plain: from a config to the one that answers for a kind of layers
    """
    permission = HeterogeneousConfigMixin.allow_global_per_layer_attribute_access
    lookup = _PerLayerConfigView.__getitem__

    @functools.wraps(lookup)
    def tolerant(view: _PerLayerConfigView, key: int | slice | str) -> Any:
        return lookup(_PerLayerConfigView(plain(view._config)) if isinstance(key, str) else view, key)

    HeterogeneousConfigMixin.allow_global_per_layer_attribute_access = property(
        lambda _: True, permission.fset
    )
    _PerLayerConfigView.__getitem__ = tolerant
    try:
        yield
    finally:
        HeterogeneousConfigMixin.allow_global_per_layer_attribute_access = permission
        _PerLayerConfigView.__getitem__ = lookup
