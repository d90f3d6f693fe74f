"""Make every `save_pretrained` of a trimmed model write a checkpoint that says what it is."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from compressed_tensors.distributed import is_source_process
from transformers import PreTrainedModel

from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.checkpoint.atomic import atomic_directory
from llmcompressor_moe.checkpoint.config_file import write_config_changes
from llmcompressor_moe.checkpoint.names import expert_names, rename_tensors
from llmcompressor_moe.saving.card import write_model_card
from llmcompressor_moe.surgery.compact import sync_config
from llmcompressor_moe.surgery.config_changes import ConfigChanges
from llmcompressor_moe.surgery.repack import has_quantized_experts
from llmcompressor_moe.topology import text_config

__all__ = ["HISTORY_FILE", "is_research_only", "save_says_what_it_is"]

HISTORY_FILE = "trimming.json"


def save_says_what_it_is(model: PreTrainedModel, changes: ConfigChanges) -> None:
    """Wrap ``model.save_pretrained``: config, tensor names, model card and history agree, `check` passes, or
    nothing is written.

    :param changes: config fields as the model came
    """
    if getattr(model.save_pretrained, "_says_what_it_is", False):
        return
    inner = model.save_pretrained

    @functools.wraps(inner)
    def save_pretrained(save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        sync_config(model)
        if not is_source_process():
            inner(save_directory, *args, **kwargs)
            return
        with atomic_directory(save_directory) as directory:
            inner(str(directory), *args, **kwargs)
            complete_checkpoint(model, directory, changes)
            check_checkpoint(directory).raise_if_errors(research=is_research_only(model))

    # Upstream wraps a method that lacks this mark, and would wrap this one again.
    save_pretrained._overridden = True
    save_pretrained._says_what_it_is = True
    model.save_pretrained = save_pretrained


def is_research_only(model: PreTrainedModel) -> bool:
    """Whether a recipe asked for a checkpoint that vLLM cannot serve."""
    return getattr(model, "_research_only", False)


def complete_checkpoint(model: PreTrainedModel, directory: Path, changes: ConfigChanges) -> None:
    """Everything that a checkpoint of a trimmed model needs beyond what llm-compressor wrote."""
    names = expert_names(text_config(model.config).model_type)
    if names is not None:
        rename_tensors(directory, names.apply)
    write_config_changes(model, directory, changes, names)
    history = getattr(model, "_trim_history", [])
    dump = [report.model_dump(mode="json") for report in history]
    (directory / HISTORY_FILE).write_text(json.dumps(dump, indent=2) + "\n")
    recipe = directory / "recipe.yaml"
    write_model_card(
        directory,
        model.config,
        history,
        recipe.read_text() if recipe.exists() else "",
        quantized_experts=has_quantized_experts(model),
        research=is_research_only(model),
    )
