"""Permission to read the general value of an attribute that differs by layer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity import HeterogeneousConfigMixin

__all__ = ["allow_global_access"]


def allow_global_access(config: PreTrainedConfig) -> None:
    """Let code that knows nothing of differing layers read the general value, in memory only.

    The permission is never written to a file: a reader that does not know the format has to fail.

    :param config: a text config with differing layers
    """
    _keep_permission_out_of_files()
    config.allow_global_per_layer_attribute_access = True


def _keep_permission_out_of_files() -> None:
    original = HeterogeneousConfigMixin._update_heterogeneous_to_dict_output
    if getattr(original, "_drops_permission", False):
        return

    def update(self: PreTrainedConfig, d: dict[str, Any]) -> None:
        original(self, d)
        d.pop("allow_global_per_layer_attribute_access", None)

    # Stays for good: configs with the permission outlive whoever gave it.
    update._drops_permission = True
    HeterogeneousConfigMixin._update_heterogeneous_to_dict_output = update
