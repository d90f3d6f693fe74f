"""Keep config.json true to the model that is saved beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.opened import keeps_stored_precision
from llmcompressor_moe.checkpoint.quantized_names import cover_quantized_modules
from llmcompressor_moe.surgery.config_changes import NEVER_WRITTEN, ConfigChanges
from llmcompressor_moe.topology import text_config

__all__ = ["edit_config", "write_config_changes"]


def write_config_changes(
    model: PreTrainedModel, directory: Path, changes: ConfigChanges, spell: Callable[[str], list[str]]
) -> None:
    """Bring ``config.json`` in ``directory`` up to date, in place.

    :param changes: what the cut changed
    :param spell: path of a module -> every name that a quantization config has to cover
    """
    edit_config(directory, lambda whole: _apply(whole, model, changes, spell))


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change ``config.json`` in ``directory`` in place.

    :param edit: changes its fields
    """
    path = directory / "config.json"
    whole = json.loads(path.read_text())
    edit(whole)
    path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def _apply(
    whole: dict[str, Any],
    model: PreTrainedModel,
    changes: ConfigChanges,
    spell: Callable[[str], list[str]],
) -> None:
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
        level.pop(NEVER_WRITTEN, None)
    if "quantization_config" in whole and not keeps_stored_precision(model):
        cover_quantized_modules(model, whole["quantization_config"], spell)
