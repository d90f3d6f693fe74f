"""Make every `save_pretrained` of a trimmed model write a checkpoint that says what it is."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressed_tensors.distributed import is_source_process
from transformers import PreTrainedModel

from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.checkpoint.atomic import atomic_directory
from llmcompressor_moe.checkpoint.config_file import write_config_changes
from llmcompressor_moe.checkpoint.module_names import saved_module_names
from llmcompressor_moe.checkpoint.names import expert_names, rename_tensors
from llmcompressor_moe.checkpoint.opened import opened_from
from llmcompressor_moe.checkpoint.quantized_names import stack_pattern
from llmcompressor_moe.compat.llmcompressor.saving import mark_wrapped
from llmcompressor_moe.limits import BrokenLimit, LimitsBrokenError
from llmcompressor_moe.saving.card import write_model_card
from llmcompressor_moe.saving.tensors import stored_module_names
from llmcompressor_moe.surgery.compact import sync_config
from llmcompressor_moe.surgery.config_changes import ConfigChanges
from llmcompressor_moe.surgery.repack import has_quantized_experts
from llmcompressor_moe.topology import find_topology

__all__ = [
    "HISTORY_FILE",
    "broken_limits_of",
    "is_research_only",
    "keep_apart",
    "rejected",
    "remember_earlier_reports",
    "save_says_what_it_is",
    "saved_reports",
]

HISTORY_FILE = "trimming.json"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PROJECTION = re.compile(r"(\.experts\.\d+\.)(\w+)(?=\.|$)")


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
        broken = broken_limits_of(model)
        target = rejected(save_directory) if broken else Path(save_directory)
        with atomic_directory(target) as directory:
            inner(str(directory), *args, **kwargs)
            complete_checkpoint(model, directory, changes)
            check_checkpoint(directory).raise_if_errors(research=is_research_only(model))
        if broken:
            raise LimitsBrokenError(broken, f"The checkpoint is kept apart in {str(target)!r}.")

    mark_wrapped(save_pretrained)
    save_pretrained._says_what_it_is = True
    model.save_pretrained = save_pretrained


def keep_apart(model: PreTrainedModel, broken: list[BrokenLimit]) -> None:
    """Have a model that breaks limits saved beside where it is asked for, with an error."""
    model._broken_limits = broken


def broken_limits_of(model: PreTrainedModel) -> list[BrokenLimit]:
    """Limits of its recipe that a model does not keep."""
    return getattr(model, "_broken_limits", [])


def rejected(directory: str | Path) -> Path:
    """Where a checkpoint that breaks limits goes instead."""
    directory = Path(directory)
    return directory.with_name(f"{directory.name}.rejected")


def is_research_only(model: PreTrainedModel) -> bool:
    """Whether a recipe asked for a checkpoint that vLLM cannot serve."""
    return getattr(model, "_research_only", False)


def saved_reports(checkpoint: str | Path) -> list[dict[str, Any]]:
    """The reports of all that was done to a checkpoint before, oldest first; empty where it has none.

    :param checkpoint: its directory
    :raises ValueError: the file is not such a list
    """
    path = Path(checkpoint) / HISTORY_FILE
    if not checkpoint or not path.is_file():
        return []
    try:
        reports = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); write the checkpoint again.") from error
    if not isinstance(reports, list) or not all(isinstance(report, dict) for report in reports):
        raise ValueError(f"{path} must hold a list of reports; write the checkpoint again.")
    return reports


def remember_earlier_reports(model: PreTrainedModel) -> None:
    """Read what was done to the checkpoint that a model was loaded from, for the history of the one it becomes.

    Before any work, because that checkpoint may be overwritten in the end.

    :raises ValueError: its history cannot be read
    """
    if not hasattr(model, "_earlier_reports"):
        model._earlier_reports = saved_reports(model.config._name_or_path or "")


def complete_checkpoint(model: PreTrainedModel, directory: Path, changes: ConfigChanges) -> None:
    """Everything that a checkpoint of a trimmed model needs beyond what llm-compressor wrote."""
    write_config_changes(model, directory, changes, _name_as_family(model, directory))
    history = getattr(model, "_trim_history", [])
    dump = [*getattr(model, "_earlier_reports", []), *(report.model_dump(mode="json") for report in history)]
    (directory / HISTORY_FILE).write_text(json.dumps(dump, indent=2) + "\n")
    recipe = directory / "recipe.yaml"
    write_model_card(
        directory,
        model.config,
        history,
        recipe.read_text() if recipe.exists() else "",
        quantized_experts=has_quantized_experts(model),
        research=is_research_only(model),
        mtp=getattr(model, "_mtp_note", ""),
    )


def _name_as_family(model: PreTrainedModel, directory: Path) -> Callable[[str], list[str]]:
    """Give tensors the names of their family; return a function from a module's path to all names it goes by."""
    names = expert_names(model.config)
    stack = find_topology(model).stack
    opened = opened_from(model)
    stacks = {stack} if opened is None else {stack, opened.stored_stack}
    in_block = re.compile(rf"{stack_pattern(stacks)}\.")

    def known(path: str) -> list[str]:
        # Towers have modules of the same names, which families rename in their text model only.
        return names.spellings(path) if names and in_block.match(path) else [path]

    if opened is not None:
        stored = functools.cache(lambda: stored_module_names(model, opened))
        return lambda path: list(dict.fromkeys([*known(path), stored().get(path, path)]))
    saved = saved_module_names(model)
    restored = {
        tail: projection
        for projection in _PROJECTIONS
        for tail in (name.rpartition(".")[2] for name in saved(f"{stack}.0.mlp.experts.0.{projection}"))
        if tail != projection
    }

    def own(name: str) -> str:
        # Rules for other layers change the names of single experts, too.
        name = _PROJECTION.sub(lambda match: f"{match[1]}{restored.get(match[2], match[2])}", name)
        return names.apply(name) if names else name

    if names or restored:
        rename_tensors(directory, own)
    return lambda path: list(dict.fromkeys([*known(path), *map(own, saved(path))]))
