"""Smoothing mappings for AWQ and SmoothQuant that leave an MoE model's function as it is.

Both modifiers divide the output of a layer (a norm, say) by scales per channel and multiply the weights that
read it by the same scales. That changes nothing only if every reader is scaled. llm-compressor's lists name
projections; in an MoE layer the router and the shared experts read the norm, too, and where they are left out
tokens go to other experts than before. So lists that reach into the experts are completed from where the
modules stand.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers.transform.awq import AWQMapping
from llmcompressor.modifiers.transform.awq.dynamic_mappings import (
    get_layer_mappings_from_model as upstream_awq_mappings,
)
from llmcompressor.modifiers.transform.smoothquant.dynamic_mappings import (
    get_layer_mappings_from_model as upstream_smoothquant_mappings,
)
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from llmcompressor_moe.compat.llmcompressor.linear_experts import between_layers
from llmcompressor_moe.topology import Block, expert_modules, find_topology

__all__ = ["awq_mappings", "smoothquant_mappings", "upstream_awq_mappings", "upstream_smoothquant_mappings"]

# The second layer of a feed-forward network, under any of its names: it reads activations, not the norm.
_SECOND_LINEAR = re.compile(r"(^|\.)(down_proj|output_linear|w2|fc2)$")


def awq_mappings(model: PreTrainedModel) -> list[AWQMapping]:
    """llm-compressor's AWQ mappings for a model, each completed with everything that reads the layer in
    question, and written per block, so that blocks of several kinds can stand in one stack, and towers with layers
    of the same names beside it.

    Left out are mappings from an expert's up projection to its down projection where the activation in
    between is not linear in the former (gpt-oss clamps it).

    :param model: experts linearized
    """
    topology = find_topology(model)
    found: dict[tuple[str, tuple[str, ...], str | None], list[int]] = defaultdict(list)
    for mapping in upstream_awq_mappings(model):
        smoothed = [name for name, _ in match_named_modules(model, [mapping.smooth_layer])]
        balanced = [
            name
            for name, module in match_named_modules(model, mapping.balance_layers)
            if _holds_matrix(module)
        ]
        for block in topology.blocks:
            inside = (_inside(block, smoothed), _inside(block, balanced))
            for smooth, balance in _in_block(model, block, *inside):
                found[smooth, balance, mapping.activation_hook_target].append(block.index)
    return [
        AWQMapping(
            _pattern(topology.stack, blocks, smooth),
            [_pattern(topology.stack, blocks, path) for path in balance],
            hook_target,
        )
        for (smooth, balance, hook_target), blocks in found.items()
    ]


def smoothquant_mappings(model: PreTrainedModel) -> list[Sequence]:
    """llm-compressor's SmoothQuant mappings for a model without those that reach into MoE layers.

    One scale per channel for all experts serves none of them: llm-compressor leaves such mappings out where it
    knows a family to be an MoE, and takes its list for dense models elsewhere.

    :param model: experts linearized
    """
    moes = find_topology(model).moe_layers.values()
    inside = [moe.experts if moe.inline else moe.module for moe in moes]
    return [
        mapping
        for mapping in upstream_smoothquant_mappings(model)
        if not _reaches_into(model, inside, tree_leaves(mapping))
    ]


def _reaches_into(model: nn.Module, places: Iterable[str], patterns: Iterable[str]) -> bool:
    prefixes = tuple(f"{place}." for place in places)
    return any(name.startswith(prefixes) for name, _ in match_named_modules(model, list(patterns)))


def _inside(block: Block, names: Iterable[str]) -> list[str]:
    prefix = f"{block.name}."
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _in_block(
    model: nn.Module, block: Block, smooth: Sequence[str], balance: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(smooth, balance) as paths in the block, experts' numbers as ``\\d+``, for one mapping.

    :param smooth: what the mapping smooths in the block, as paths in it
    :param balance: what it balances there
    """
    if len(smooth) == 1:
        readers = _readers(model, block)
        reads_norm = bool(readers) and bool(set(readers) & set(balance))
        paths = _generic([*readers, *balance] if reads_norm else balance)
        if paths:
            yield smooth[0], paths
        return
    # One pair in every expert, shared expert or dense feed-forward network.
    for path in _generic(smooth):
        parent = path.rpartition(".")[0]
        partners = tuple(other for other in _generic(balance) if other.rpartition(".")[0] == parent)
        if partners and (r"\d+" not in parent or _experts_are_linear_in_up(model, block)):
            yield path, partners


def _readers(model: nn.Module, block: Block) -> list[str]:
    """Everything in a block that reads what its MoE layer reads: paths from the block, the router first,
    because every token passes it. Shared experts can stand in the MoE layer or beside it.
    """
    moe = block.moe
    if moe is None or moe.inline:
        return []
    router = _matrices(model, moe.router)[:1] if moe.router else []
    beside = [
        f"{block.name}.{name}"
        for name, _ in model.get_submodule(block.name).named_children()
        if "shared" in name and f"{block.name}.{name}" != moe.module
    ]
    others = [
        path
        for place in [moe.module, *beside]
        for path in _matrices(model, place)
        if not (moe.router and f"{path}.".startswith(f"{moe.router}.")) and not _SECOND_LINEAR.search(path)
    ]
    return [path.removeprefix(f"{block.name}.") for path in [*router, *others]]


def _matrices(model: nn.Module, path: str) -> list[str]:
    """Paths of the modules under ``path`` (itself included) that hold a weight matrix."""
    return [
        f"{path}.{relative}" if relative else path
        for relative, module in model.get_submodule(path).named_modules()
        if _holds_matrix(module)
    ]


def _holds_matrix(module: nn.Module) -> bool:
    with disable_onloading():
        return getattr(module._parameters.get("weight"), "ndim", 0) == 2


def _generic(paths: Iterable[str]) -> tuple[str, ...]:
    """Paths with every number in them as ``\\d+``, each once, in order."""
    return tuple(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", r"\\d+", path) for path in paths))


def _pattern(stack: str, blocks: Sequence[int], path: str) -> str:
    """The pattern for a path in some blocks of a stack."""
    numbers = "|".join(map(str, blocks))
    escaped = re.escape(path).replace(re.escape(r"\d+"), r"\d+")
    return rf"re:^{re.escape(stack)}\.(?:{numbers})\.{escaped}$"


def _experts_are_linear_in_up(model: nn.Module, block: Block) -> bool:
    """Whether scaling an expert's up projection scales what its down projection gets, tried on numbers."""
    expert = expert_modules(model.get_submodule(block.moe.experts))[0]
    generator = torch.Generator().manual_seed(0)
    gate, up = (16 * torch.randn(8, 16, generator=generator) for _ in range(2))
    return torch.allclose(between_layers(expert, gate, 2 * up), 2 * between_layers(expert, gate, up))
