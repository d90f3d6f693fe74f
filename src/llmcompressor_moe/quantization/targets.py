"""Which Linears a router-aware quantization covers, by where they stand."""

from __future__ import annotations

from collections.abc import Sequence

from compressed_tensors.utils import match_name
from torch import nn

from llmcompressor_moe.surgery.session import TrimSession
from llmcompressor_moe.topology import expert_modules

__all__ = ["attention_linears", "dense_linears", "expert_linears", "without_ignored"]

_DENSE_NAMES = ("mlp", "feed_forward", "ffn", "shared")


def expert_linears(session: TrimSession, layer: int) -> list[dict[str, nn.Linear]]:
    """Module path -> Linear, for each expert that an MoE layer has now."""
    moe = session.topology.moe_layers[layer]
    experts = session.model.get_submodule(moe.experts)
    names = {child: name for name, child in experts.named_children()}
    return [
        {
            f"{moe.experts}.{names[expert]}.{name}": child
            for name, child in expert.named_children()
            if isinstance(child, nn.Linear)
        }
        for expert in expert_modules(experts)
    ]


def attention_linears(session: TrimSession) -> dict[str, nn.Linear]:
    """Linears of attention (or whatever mixes tokens) in the blocks that are there."""
    return {
        f"{block}.{child}{suffix}": linear
        for block, child, module in _children(session)
        if not _is_dense(child) and not _is_moe(session, f"{block}.{child}")
        for suffix, linear in _linears(module)
    }


def dense_linears(session: TrimSession) -> dict[str, nn.Linear]:
    """Linears of dense feed-forward layers and of shared experts; not the gates that weigh shared experts."""
    found = {
        f"{block}.{child}{suffix}": linear
        for block, child, module in _children(session)
        if _is_dense(child) and not _is_moe(session, f"{block}.{child}")
        for suffix, linear in _linears(module)
    }
    for layer in session.layers:
        for shared in session.topology.moe_layers[layer].shared_experts:
            module = session.model.get_submodule(shared)
            found |= {f"{shared}{suffix}": linear for suffix, linear in _linears(module)}
    return found


def without_ignored(linears: dict[str, nn.Linear], ignore: Sequence[str]) -> dict[str, nn.Linear]:
    """Those that no entry of ``ignore`` (names or ``re:`` patterns) matches."""
    return {
        name: linear
        for name, linear in linears.items()
        if not any(match_name(name, entry) for entry in ignore)
    }


def _children(session: TrimSession) -> list[tuple[str, str, nn.Module]]:
    blocks = [session.topology.blocks[index].name for index in session.blocks]
    return [
        (block, name, child)
        for block in blocks
        for name, child in session.model.get_submodule(block).named_children()
        if "norm" not in name
    ]


def _is_dense(name: str) -> bool:
    return any(word in name for word in _DENSE_NAMES)


def _is_moe(session: TrimSession, path: str) -> bool:
    """Whether a child of a block is an MoE layer, or (families that keep them in the block) a part of one."""
    layers = session.topology.moe_layers.values()
    return any(
        path in (moe.module, moe.experts, moe.router, *moe.shared_experts)
        or moe.module.startswith(f"{path}.")
        for moe in layers
    )


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    # A single output is a gate, not a layer.
    return [
        (f".{name}" if name else "", child)
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and child.out_features > 1
    ]
