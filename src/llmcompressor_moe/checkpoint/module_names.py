"""Under which names a checkpoint keeps the modules of a model, and which of them it does not keep by themselves.

A scheme can be said, and quantized weights can be stored, for one module alone. Where a family's checkpoints keep
one matrix for two modules, or two for one, there is no name for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.opened import OpenedCheckpoint, opened_from, opened_module
from llmcompressor_moe.compat.transformers.conversions import saved_as

__all__ = ["saved_module_names", "why_not_stored_alone"]

# Tensors of a quantized Linear. Rules for names may look at any of them.
_TENSORS = ("weight_scale", "weight", "weight_packed")


def saved_module_names(model: PreTrainedModel) -> Callable[[str], list[str]]:
    """A function from a module's path to its names in what ``save_pretrained`` of a loaded model writes: in
    quantized form, and in plain form where that is another.
    """
    saved = saved_as(model)

    def names(path: str) -> list[str]:
        found = [(saved(f"{path}.{leaf}")[0], f".{leaf}") for leaf in _TENSORS]
        return list(dict.fromkeys(name.removesuffix(leaf) for name, leaf in found if name.endswith(leaf)))

    return names


def why_not_stored_alone(model: PreTrainedModel) -> Callable[[str], str | None]:
    """A function from a Linear's path to the reason why it cannot be stored in quantized form, with the way out
    where there is one; None if it can.

    :param model: opened or loaded
    """
    opened = opened_from(model)
    return functools.partial(_not_alone_in_files, model, opened) if opened is not None else _not_saved(model)


def _not_alone_in_files(model: PreTrainedModel, opened: OpenedCheckpoint, path: str) -> str | None:
    origin = opened_module(model.get_submodule(path))
    source = origin.sources.get("weight") if origin is not None else None
    leaves = {leaf.name: leaf for leaf in source.leaves()} if source is not None else {}
    if len(leaves) > 1:
        return f"checkpoints of this family keep its weight in parts ({' and '.join(sorted(leaves))})"
    for name, leaf in leaves.items():
        modules = {target.rpartition(".")[0] for target in opened.paths.get(name, ())}
        if leaf.expert is None and len(modules) > 1:
            return f"checkpoints of this family keep its weight and others in one tensor, {name}"
    return None


def _not_saved(model: PreTrainedModel) -> Callable[[str], str | None]:
    saved = saved_as(model)
    way_out = "; open the model instead (llmcompressor_moe.open_moe)"

    def reason(path: str) -> str | None:
        names, rules = zip(*(saved(f"{path}.{leaf}") for leaf in _TENSORS), strict=True)
        if any(rules):
            return (
                f"transformers saves it in another form (its rule for {next(filter(None, rules))!r}), which it "
                f"cannot give quantized weights{way_out}"
            )
        prefixes = {name.removesuffix(f".{leaf}") for name, leaf in zip(names, _TENSORS, strict=True)}
        if len(prefixes) > 1:
            return f"transformers saves its tensors as those of {' and '.join(sorted(prefixes))}{way_out}"
        return None

    return reason
