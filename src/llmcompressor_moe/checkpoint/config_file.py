"""Keep config.json true to the model that is saved beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from llmcompressor_moe.checkpoint.names import ExpertNames
from llmcompressor_moe.checkpoint.quantized_names import cover_quantized_modules
from llmcompressor_moe.topology import text_config

__all__ = ["ConfigChanges", "write_config_changes"]

# In memory only: in a file it would let readers that do not know per-layer values pass over them.
_NEVER_WRITTEN = "allow_global_per_layer_attribute_access"


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
    fields.pop(_NEVER_WRITTEN, None)
    return fields


def write_config_changes(
    model: PreTrainedModel, directory: Path, changes: ConfigChanges, names: ExpertNames | None
) -> None:
    """Bring ``config.json`` in ``directory`` up to date, in place.

    :param changes: what the cut changed
    :param names: the family's own expert names, which a quantization config has to cover as well
    """
    path = directory / "config.json"
    whole = json.loads(path.read_text())
    config = text_config(model.config)
    fields = whole.get("text_config", whole) if config is not model.config else whole
    changed, gone = changes.of(model.config)
    for name, value in changed.items():
        spellings = [alias for alias, canonical in config.attribute_map.items() if canonical == name]
        present = [spelling for spelling in [name, *spellings] if spelling in fields]
        for spelling in present or [name]:
            fields[spelling] = value
    for name in gone:
        fields.pop(name, None)
    for level in (whole, fields):
        level.pop(_NEVER_WRITTEN, None)
    if "quantization_config" in whole:
        cover_quantized_modules(model, whole["quantization_config"], names)
    path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
