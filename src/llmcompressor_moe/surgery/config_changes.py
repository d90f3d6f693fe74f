"""What a cut changed in a config, told from the config as it came."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedConfig

from llmcompressor_moe.topology import text_config

__all__ = ["NEVER_WRITTEN", "ConfigChanges"]

# In memory only: in a file it would let readers that do not know per-layer values pass over them.
NEVER_WRITTEN = "allow_global_per_layer_attribute_access"


class ConfigChanges:
    """Text-config fields that differ from those the model came with.

    llm-compressor saves the original config.json and patches three fields; all others that a cut changed are
    written after it.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._before = _fields(config)

    def of(self, config: PreTrainedConfig) -> tuple[dict[str, Any], set[str]]:
        """(changed or new fields, fields that are gone)."""
        now = _fields(config)
        changed = {
            name: value
            for name, value in now.items()
            if name not in self._before or self._before[name] != value
        }
        return changed, {name for name in self._before if name not in now}


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields = json.loads(json.dumps(text_config(config).to_dict(), default=str))
    fields.pop(NEVER_WRITTEN, None)
    return fields
