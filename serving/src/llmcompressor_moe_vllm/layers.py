"""Builds one decoder layer by its override."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmcompressor_moe_vllm.config_view import layer_view
from llmcompressor_moe_vllm.overrides import LayerOverride

if TYPE_CHECKING:
    from vllm.config import CompilationConfig


class DroppedFeedForward(nn.Module):
    """Stands where a dropped MoE was: adds nothing to the residual stream and has no weights."""

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Zeros like `hidden_states`, whatever else the layer passes."""
        return torch.zeros_like(hidden_states)


@dataclass(frozen=True)
class BuiltLayer:
    """What came of building a layer, for the verification."""

    dropped: str | None
    """Name of the feed-forward that is left out, where one is."""
    expert_counts: tuple[int, ...]
    """Routed experts of each fused MoE left in the layer."""
    read_per_layer_config: bool
    """The layer asked the config for its own values."""
    expert_widths: tuple[int, ...] = ()
    """Channels of the routed experts of each fused MoE left in the layer."""


def build_layer(
    make: Callable[[], nn.Module], override: LayerOverride, compilation_config: "CompilationConfig"
) -> tuple[nn.Module, BuiltLayer]:
    """Call `make` so that the layer comes out as `override` says.

    A layer without a fused MoE is returned as it is, so that stacks of other parts of the model (a vision
    tower with as many layers) pass through; the caller verifies what was applied. A dropped feed-forward has no
    memory any more, but keeps its place until `leave_out`: models look at their MoE layers once all are built.
    """
    known = set(compilation_config.static_forward_context)
    with layer_view(override.values) as reads:
        layer = make()
    # Every fused MoE and every attention registers itself here, whatever its class and place in the layer.
    added = {n: m for n, m in compilation_config.static_forward_context.items() if n not in known}
    moes = {n: m for n, m in added.items() if n in compilation_config.static_all_moe_layers}
    dropped = None
    if override.dropped and moes:
        dropped = _release_feed_forward(layer, added, moes, compilation_config)
    left = [] if dropped else [moe.moe_config for moe in moes.values()]
    counts = tuple(moe.num_logical_experts for moe in left)
    return layer, BuiltLayer(
        dropped, counts, reads.per_layer_config, tuple(moe.intermediate_size for moe in left)
    )


def leave_out(layer: nn.Module, name: str) -> None:
    """Put a `DroppedFeedForward` in the place of the part of `layer` that was dropped when it was built."""
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, DroppedFeedForward())


def _release_feed_forward(
    layer: nn.Module,
    added: dict[str, nn.Module],
    moes: dict[str, nn.Module],
    compilation_config: "CompilationConfig",
) -> str | None:
    """Free the largest part of `layer` that holds the MoE and no attention; returns its name."""
    others = {id(m) for n, m in added.items() if n not in moes}
    inside = {id(m) for m in moes.values()}
    name = _widest_part(layer, inside, others)
    if name is None:
        return None
    for registered in moes:
        del compilation_config.static_forward_context[registered]
        compilation_config.static_all_moe_layers.remove(registered)
    for tensor in layer.get_submodule(name).parameters():
        tensor.data = tensor.data.new_empty(0)
    return name


def _widest_part(layer: nn.Module, inside: set[int], others: set[int]) -> str | None:
    for name, part in layer.named_modules():
        held = {id(m) for m in part.modules()}
        if name and inside <= held and not others & held:
            return name
    return None
