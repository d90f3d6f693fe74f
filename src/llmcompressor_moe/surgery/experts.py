"""Remove experts from an MoE layer: the experts themselves and their rows in the router."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.offload import align_module_device, disable_onloading
from torch import nn

from llmcompressor_moe.checkpoint.cache import take
from llmcompressor_moe.checkpoint.opened import opened_module
from llmcompressor_moe.topology import MoELayer, expert_modules

__all__ = ["RoutingParts", "keep_experts", "routing_parts", "select", "shown_to_keep"]

# Plain integers that modules derive from the expert count.
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "n_experts", "out_features")


@dataclass(frozen=True)
class RoutingParts:
    """What an MoE layer has once per expert, outside of the experts.

    :param tensors: (module, name, axis with one entry per expert) of parameters and buffers
    :param counts: (module, name) of plain integers that are the number of experts
    """

    num_experts: int
    tensors: tuple[tuple[nn.Module, str, int], ...]
    counts: tuple[tuple[nn.Module, str], ...]


def routing_parts(model: nn.Module, moe: MoELayer) -> RoutingParts:
    """Find them.

    :param moe: the layer as it is now
    """
    with disable_onloading():
        tensors = tuple(_per_expert_tensors(model, moe))
    return RoutingParts(moe.num_experts, tensors, tuple(_counts(model, moe)))


@contextlib.contextmanager
def shown_to_keep(parts: RoutingParts, kept: Sequence[int]) -> Iterator[None]:
    """Let routing see only the experts ``kept`` for the time of the context, as after `keep_experts`. Indices that
    it gives are positions in ``kept``.

    Nothing stored is touched: a cut copy in the module's own attributes hides each tensor, wherever it is.
    """
    try:
        for module, name, axis in parts.tensors:
            whole = getattr(module, name)
            index = torch.tensor(kept, device=whole.device)
            module.__dict__[name] = whole.detach().index_select(axis, index)
        for module, name in parts.counts:
            setattr(module, name, len(kept))
        yield
    finally:
        for module, name, _ in parts.tensors:
            module.__dict__.pop(name, None)
        for module, name in parts.counts:
            setattr(module, name, parts.num_experts)


def keep_experts(model: nn.Module, moe: MoELayer, kept: Sequence[int]) -> None:
    """Keep only the experts ``kept``, renumbered in that order, and cut the router to match.

    Experts stay the same module objects (offloading travels with them). Every parameter and buffer of the MoE
    layer outside of the experts that has an expert axis (router weight and bias, correction biases,
    per-expert scales) loses the same rows.

    :param moe: the layer as it is now
    :param kept: indices among its present experts
    :raises ValueError: an index is out of range or twice in the list, or too few would be left for the router
    """
    if len(set(kept)) != len(kept) or any(not 0 <= index < moe.num_experts for index in kept):
        raise ValueError(f"{moe.module}: kept={list(kept)} must be distinct indices under {moe.num_experts}.")
    if len(kept) < moe.min_experts:
        raise ValueError(
            f"{moe.module}: {len(kept)} experts would be left, but its router needs {moe.min_experts} "
            f"(top_k={moe.top_k}, groups={moe.num_groups})."
        )
    experts = model.get_submodule(moe.experts)
    parts = routing_parts(model, moe)
    for holder, name, axis in parts.tensors:
        select(holder, name, axis, kept)
    modules = expert_modules(experts)
    others = {name: child for name, child in experts._modules.items() if child not in modules}
    experts._modules = OrderedDict((str(new), modules[old]) for new, old in enumerate(kept))
    experts._modules.update(others)
    for holder, name in parts.counts:
        setattr(holder, name, len(kept))


def _counts(model: nn.Module, moe: MoELayer) -> Iterator[tuple[nn.Module, str]]:
    holders = [model.get_submodule(moe.module), model.get_submodule(moe.experts)]
    holders += list(model.get_submodule(moe.router).modules()) if moe.router else []
    for holder in holders:
        for name in _COUNTS:
            value = holder.__dict__.get(name)
            if isinstance(value, int) and value == moe.num_experts:
                yield holder, name


def _per_expert_tensors(model: nn.Module, moe: MoELayer) -> Iterator[tuple[nn.Module, str, int]]:
    """(holder, name, axis) of every tensor outside of the experts that has one entry per expert."""
    root = model.get_submodule(moe.module)
    outside = (moe.experts, *moe.shared_experts)
    if moe.inline:
        holders = [(moe.router, model.get_submodule(moe.router))] if moe.router else []
    else:
        holders = [(moe.module, root)]
    for path, holder in holders:
        for relative, module in holder.named_modules():
            full = f"{path}.{relative}" if relative else path
            if any(full == other or full.startswith(f"{other}.") for other in outside):
                continue
            is_router = moe.router is not None and (full == moe.router or full.startswith(f"{moe.router}."))
            for name, tensor in [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]:
                axis = _expert_axis(tensor, moe.num_experts, is_router)
                if axis is not None:
                    yield module, name, axis


def _expert_axis(tensor: torch.Tensor, num_experts: int, is_router: bool) -> int | None:
    """The axis with one entry per expert. Outside of the router only vectors count: a matrix there may have
    that size by chance.
    """
    if not is_router and tensor.numel() != num_experts:
        return None
    return next((axis for axis, size in enumerate(tensor.shape) if size == num_experts), None)


def select(holder: nn.Module, name: str, axis: int, kept: Sequence[int]) -> None:
    """Keep some entries of an axis of a module's parameter or buffer, wherever it is kept."""
    origin = opened_module(holder)
    if origin is not None:
        origin.note_cut(name, axis, kept)
    if take(holder, name, axis, kept):
        return
    with align_module_device(holder):
        old = getattr(holder, name)
        new = old.detach().index_select(axis, torch.tensor(kept, device=old.device)).contiguous()
    # Assignment also replaces the tensor in an offload cache, with its new shape.
    is_parameter = name in holder._parameters
    setattr(holder, name, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)
