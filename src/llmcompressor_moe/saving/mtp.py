"""What becomes of multi-token-prediction (MTP) layers, which transformers does not load: kept, cut alike, or
left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.opened import OpenedCheckpoint, opened_module
from llmcompressor_moe.families import MTP_COUNTS
from llmcompressor_moe.saving.shards import OutputTensor
from llmcompressor_moe.saving.tensors import copied, rows
from llmcompressor_moe.topology import MoELayer, NotAnMoEError, expert_modules, find_topology, text_config

__all__ = ["MtpPlan", "cut_tensor", "is_mtp", "plan_mtp"]

_COMPONENT = re.compile(r"(^|\.)mtp(_[a-z]+)?(\.|$)")
_EXPERT = re.compile(r"^(?P<moe>.+)\.experts\.(?P<expert>\d+)\.(?P<rest>.+)$")
_FUSED = re.compile(r"^(?P<moe>.+)\.experts\.[^.]+(\.weight)?$")


@dataclass(frozen=True)
class MtpPlan:
    """Decision on the MTP layers of a checkpoint.

    :param keep: whether they are written
    :param experts: name of an MoE layer in the files -> its experts that stay; empty where all do
    :param note: a sentence for the model card; empty where there is nothing to say of MTP layers
    """

    keep: bool
    experts: Mapping[str, tuple[int, ...]]
    note: str


def is_mtp(name: str, opened: OpenedCheckpoint) -> bool:
    """Whether a stored tensor belongs to an MTP layer: a block after the last one, or a part that is called so."""
    prefix = f"{opened.stored_stack}."
    index = name.removeprefix(prefix).split(".", 1)[0]
    trailing = name.startswith(prefix) and index.isdigit() and int(index) >= opened.num_blocks
    return trailing or _COMPONENT.search(name) is not None


def plan_mtp(model: PreTrainedModel, opened: OpenedCheckpoint, quantizes: bool) -> MtpPlan:
    """Decide what is right for the MTP layers after a recipe.

    They share embeddings and head, which no drop changes, and the model's counts of experts. Where every MoE layer
    lost as many experts, those of an MTP layer with the smallest weights go: it drafts only, so which ones go
    changes its speed and never what is generated.

    :param quantizes: whether the recipe quantized weights
    """
    names = [name for name in sorted(opened.unused) if is_mtp(name, opened)]
    if not names:
        announced = any(getattr(text_config(model.config), name, None) for name in MTP_COUNTS)
        note = "MTP layers are switched off: no file of the source holds one." if announced else ""
        return MtpPlan(not announced, {}, note)
    before = {layer.num_experts for layer in opened.moe_layers}
    try:
        now = list(find_topology(model).moe_layers.values())
    except NotAnMoEError:
        now = []
    counts = {layer.num_experts for layer in now}
    own = _own_experts(names, opened)
    if quantizes:
        return MtpPlan(False, {}, "MTP layers are switched off: they are not quantized with the rest.")
    if own and any(_is_narrower(model, layer) for layer in now):
        return MtpPlan(False, {}, "MTP layers are switched off: their experts are as wide as they were.")
    if not own or (counts == before and len(counts) == 1):
        return MtpPlan(True, {}, "MTP layers are kept.")
    if len(counts) != 1 or len(before) != 1 or len(opened.moe_layers) != _moe_layers_left(model, opened, now):
        return MtpPlan(
            False, {}, "MTP layers are switched off: the layers differ, and no config can say it of them."
        )
    kept = {moe: _largest(parts, now[0], counts.pop(), opened) for moe, parts in own.items()} if now else {}
    return MtpPlan(
        True, kept, "MTP layers are cut to the same number of experts, those with the largest weights."
    )


def _is_narrower(model: PreTrainedModel, layer: MoELayer) -> bool:
    """Whether a layer's experts have lost channels."""
    origin = opened_module(expert_modules(model.get_submodule(layer.experts))[0].down_proj)
    return origin is not None and "weight" in origin.cuts


def _moe_layers_left(model: PreTrainedModel, opened: OpenedCheckpoint, now: Sequence[MoELayer]) -> int:
    """MoE layers that a model without dropped MoE layers would have had."""
    blocks_gone = opened.num_blocks - len(model.get_submodule(opened.stack))
    return len(now) + blocks_gone


def _own_experts(names: Sequence[str], opened: OpenedCheckpoint) -> dict[str, dict[int | None, list[str]]]:
    """Name of an MoE layer -> expert (None: all, fused) -> logical names."""
    found: dict[str, dict[int | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if match := _EXPERT.match(name):
            found[match["moe"]][int(match["expert"])].append(name)
        elif (match := _FUSED.match(name)) and opened.logical[name].ndim >= 2:
            found[match["moe"]][None].append(name)
    return found


def _largest(
    parts: Mapping[int | None, Sequence[str]], layer: MoELayer, count: int, opened: OpenedCheckpoint
) -> tuple[int, ...]:
    """The experts with the largest squared norms, as many in every group of the router."""
    fused = parts.get(None, ())
    total = (
        opened.logical[fused[0]].shape[0] if fused else max(index for index in parts if index is not None) + 1
    )
    norms = torch.zeros(total, dtype=torch.float64)
    for expert in range(total):
        sources = [opened.logical[name].select(0, expert) for name in fused]
        sources += [opened.logical[name] for name in parts.get(expert, ())]
        for source in sources:
            norms[expert] += source.read(torch.float32).square().sum(dtype=torch.float64)
    groups = norms.view(layer.num_groups, -1)
    best = groups.topk(count // layer.num_groups, dim=1).indices
    first = torch.arange(layer.num_groups)[:, None] * groups.shape[1]
    return tuple(sorted((best + first).flatten().tolist()))


def cut_tensor(plan: MtpPlan, opened: OpenedCheckpoint, part: str, name: str) -> Iterator[OutputTensor]:
    """One stored tensor of an MTP layer, without the experts that go.

    :param part: its stored name
    :param name: the name that it is written under, before experts are renumbered
    """
    if match := _EXPERT.match(part):
        kept = plan.experts.get(match["moe"])
        expert = int(match["expert"])
        if kept is None:
            yield copied(opened.stored, part, name)
        elif expert in kept:
            moved = _EXPERT.match(name)
            yield copied(opened.stored, part, f"{moved['moe']}.experts.{kept.index(expert)}.{moved['rest']}")
        return
    shape = opened.stored.tensors[part].shape
    for moe, kept in plan.experts.items():
        total = _total(moe, opened)
        if part.startswith(f"{moe}.") and ".shared" not in part and shape and shape[0] == total:
            yield rows(opened.stored, part, name, 0, kept)
            return
    yield copied(opened.stored, part, name)


def _total(moe: str, opened: OpenedCheckpoint) -> int:
    """Experts that an MTP layer was stored with."""
    own = _own_experts([name for name in opened.unused if name.startswith(f"{moe}.")], opened)[moe]
    fused = own.get(None)
    return (
        opened.logical[fused[0]].shape[0] if fused else 1 + max(index for index in own if index is not None)
    )
