"""Which stored tensors a model's parameters are made of: transformers' own rules for names and layouts, applied to
sources instead of data.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from llmcompressor_moe.checkpoint.sources import Computed, Deinterleaved, Joined, Leaf, Source, Stacked

__all__ = ["model_sources"]

_LINEAR_EXPERT = re.compile(
    r"^(?P<experts>.+)\.(?P<expert>\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)$"
)


def model_sources(
    model: PreTrainedModel, logical: Mapping[str, Leaf], experts: set[str]
) -> tuple[dict[str, Source], set[str]]:
    """Match stored tensors with a model's parameters and persistent buffers.

    :param model: as transformers builds it, on the meta device, experts fused
    :param logical: stored name -> leaf
    :param experts: paths of the modules that hold fused experts
    :return: path of a parameter -> source, in the model's own names; experts that are stored one by one under
        llm-compressor's names also as ``<experts>.<index>.<projection>.weight``. And the stored names that the
        model has no use for
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted = model.state_dict()
    found: dict[str, Source] = {}
    collected: dict[str, tuple[WeightConverter, dict[str, list[Leaf]]]] = {}
    unused: set[str] = set()
    for name in sorted(logical, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target in wanted and pattern is not None:
            _, parts = collected.setdefault(target, (by_pattern[pattern], defaultdict(list)))
            parts[pattern].append(logical[name])
        elif target in wanted:
            found[target] = logical[name]
        elif (expert := _LINEAR_EXPERT.match(_module_name(name, renamings, model, wanted))) and expert[
            1
        ] in experts:
            found[expert[0]] = logical[name]
        else:
            unused.add(name)
    for target, (converter, parts) in collected.items():
        found |= _converted(converter, parts, target, model, wanted)
    return found, unused


def _module_name(
    name: str, renamings: list[WeightRenaming], model: PreTrainedModel, wanted: Mapping[str, torch.Tensor]
) -> str:
    """A stored name with the model's names of modules in it, whether or not the model has such a tensor."""
    return rename_source_key(name, renamings, [], model.base_model_prefix, wanted)[0]


def _is_of(experts: set[str], name: str) -> bool:
    match = _LINEAR_EXPERT.match(name)
    return match is not None and match["experts"] in experts


def _converted(
    converter: WeightConverter,
    parts: Mapping[str, list[Leaf]],
    target: str,
    model: PreTrainedModel,
    wanted: Mapping[str, torch.Tensor],
) -> dict[str, Source]:
    """What one converter makes of the tensors that it collected: path of a parameter -> source."""
    values: dict[str, list[Source] | Source] = dict(parts)
    for operation in converter.operations:
        apply = _OPERATIONS.get(type(operation))
        if apply is None:
            return _computed(converter, parts, target, model, wanted)
        values = apply(operation, values, converter, wanted.get(target))
    plain = {name: value[0] if isinstance(value, list) else value for name, value in values.items()}
    prefix, _, suffix = next(target.partition(name) for name in plain if name in target)
    return {f"{prefix}{name}{suffix}": source for name, source in plain.items()}


Values = dict[str, list[Source] | Source]


def _one(values: Values) -> Source:
    (value,) = values.values()
    return value[0] if isinstance(value, list) else value


def _merge(_op: MergeModulelist, values: Values, converter: WeightConverter, _target: Any) -> Values:
    stacked = {name: Stacked(value) for name, value in values.items()}
    return {converter.target_patterns[0]: _one(stacked)} if len(stacked) == 1 else dict(stacked)


def _concatenate(op: Concatenate, values: Values, converter: WeightConverter, _target: Any) -> Values:
    children: list[Source] = []
    for pattern in converter.source_patterns:
        value = values.get(pattern, [])
        children += value if isinstance(value, list) else [value]
    return {converter.target_patterns[0]: Joined(children, op.dim)}


def _chunk(op: Chunk, values: Values, converter: WeightConverter, _target: Any) -> Values:
    source, targets = _one(values), converter.target_patterns
    size = -(-source.shape[op.dim] // len(targets))
    ranges = [(i * size, min((i + 1) * size, source.shape[op.dim])) for i in range(len(targets))]
    return {name: source.slice(op.dim, *span) for name, span in zip(targets, ranges, strict=True)}


def _transpose(op: Transpose, values: Values, converter: WeightConverter, target: Any) -> Values:
    source = _one(values)
    if not (op.check_dims and target is not None and source.shape == target.shape):
        source = source.transpose(op.dim0, op.dim1)
    return {_through(converter): source}


def _interleave(op: Interleave, values: Values, converter: WeightConverter, _target: Any) -> Values:
    if op.inverse:
        raise ValueError("interleaving on load is not known to any family")
    return {_through(converter): Deinterleaved(_one(values), op.dim)}


def _split_by_modality(
    op: ErnieFuseAndSplitTextVisionExperts, values: Values, converter: WeightConverter, _target: Any
) -> Values:
    """Experts for text, and those for images after them, are stored in one list."""
    targets = converter.target_patterns
    found: dict[str, list[Source]] = {name: [] for name in targets}
    for pattern in converter.source_patterns:
        leaves = values[pattern]
        size = -(-len(leaves) // len(targets))
        for position, name in enumerate(targets):
            found[name].append(Stacked(leaves[position * size : (position + 1) * size]))
    return {
        name: parts[0] if len(parts) == 1 else Joined(parts, op.concat_dim) for name, parts in found.items()
    }


def _through(converter: WeightConverter) -> str:
    """The name that a one-to-one operation leaves: the source's while more than one target is to follow."""
    several = len(converter.target_patterns) > 1
    return converter.source_patterns[0] if several else converter.target_patterns[0]


_OPERATIONS: dict[type, Callable[[Any, Values, WeightConverter, Any], Values]] = {
    MergeModulelist: _merge,
    Concatenate: _concatenate,
    Chunk: _chunk,
    Transpose: _transpose,
    Interleave: _interleave,
    ErnieFuseAndSplitTextVisionExperts: _split_by_modality,
}


def _computed(
    converter: WeightConverter,
    parts: Mapping[str, list[Leaf]],
    target: str,
    model: PreTrainedModel,
    wanted: Mapping[str, torch.Tensor],
) -> dict[str, Source]:
    """Operations that have no description here are run on whole tensors when the parameter is read."""
    children = [leaf for leaves in parts.values() for leaf in leaves]

    def results(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        run = copy.deepcopy(converter)
        remaining = iter(tensors)
        for pattern, leaves in parts.items():
            for leaf in leaves:
                run.add_tensor(target, leaf.name, pattern, next(remaining))
        return run.convert(target, model=model, config=model.config)

    meta = results([child.meta for child in children])
    return {
        name: Computed(children, lambda tensors, name=name: results(tensors)[name], value)
        for name, value in meta.items()
        if name in wanted
    }
