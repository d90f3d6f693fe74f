"""Which Linears a router-aware quantization covers, by where they stand."""

from __future__ import annotations

from collections.abc import Sequence

from compressed_tensors.utils import match_name
from torch import nn

from llmcompressor_moe.parts import ATTENTION, DENSE, SHARED, part_of
from llmcompressor_moe.surgery.session import TrimSession
from llmcompressor_moe.topology import expert_modules

__all__ = ["attention_linears", "dense_linears", "expert_linears", "without_ignored"]


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
    return _linears_of(session, (ATTENTION,))


def dense_linears(session: TrimSession) -> dict[str, nn.Linear]:
    """Linears of dense feed-forward layers and of shared experts; not the gates that weigh shared experts."""
    return _linears_of(session, (DENSE, SHARED))


def without_ignored(linears: dict[str, nn.Linear], ignore: Sequence[str]) -> dict[str, nn.Linear]:
    """Those that no entry of ``ignore`` (names or ``re:`` patterns) matches."""
    return {
        name: linear
        for name, linear in linears.items()
        if not any(match_name(name, entry) for entry in ignore)
    }


def _linears_of(session: TrimSession, parts: tuple[str, ...]) -> dict[str, nn.Linear]:
    gone = tuple(f"{session.topology.moe_layers[index].module}." for index in session.dropped_layers)
    found = {}
    for block in (session.topology.blocks[index] for index in session.blocks):
        for suffix, module in session.model.get_submodule(block.name).named_modules():
            name = f"{block.name}.{suffix}"
            # A single output is a gate, not a layer.
            if not isinstance(module, nn.Linear) or module.out_features == 1 or name.startswith(gone):
                continue
            if part_of(f"{name}.weight", block) in parts:
                found[name] = module
    return found
