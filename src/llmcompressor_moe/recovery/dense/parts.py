"""Find a block's feed-forwards and read their weights, whichever way the family stores them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llmcompressor_moe.topology import Block

__all__ = [
    "FeedForward",
    "beside",
    "feed_forward",
    "feed_forward_width",
    "has_feed_forward",
    "mlp_prefix",
    "shared",
]

_DOWN = ("down_proj", "output_linear")
_JOINED = ("gate_up_proj", "input_linear")


@dataclass(frozen=True)
class FeedForward:
    """A gated feed-forward, y = down (act(gate x) * (up x)), as neurons.

    :param gate: [neurons, hidden]
    :param up: [neurons, hidden]
    :param down: [hidden, neurons]
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @property
    def width(self) -> int:
        """Neurons."""
        return self.gate.shape[0]


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name, child in module.named_children() if name in names), None)


def _is_feed_forward(module: nn.Module) -> bool:
    return _child(module, _DOWN) is not None and _child(module, (*_JOINED, "gate_proj")) is not None


def feed_forward(module: nn.Module) -> FeedForward:
    """A module's neurons in fp32, copied.

    :raises ValueError: it has no gate, or biases, which this version does not merge
    """
    down, joined = _child(module, _DOWN), _child(module, _JOINED)
    gate, up = _child(module, ("gate_proj",)), _child(module, ("up_proj",))
    found = [child for child in (down, joined, gate, up) if child is not None]
    if down is None or (joined is None and (gate is None or up is None)):
        raise ValueError(
            f"{type(module).__name__} is not a gated feed-forward (gate_proj, up_proj, down_proj); only those are "
            "merged."
        )
    if any(getattr(child, "bias", None) is not None for child in found):
        raise ValueError(f"{type(module).__name__} has biases; only experts without them are merged.")
    if joined is not None:
        first, second = joined.weight.detach().float().chunk(2)
    else:
        first, second = gate.weight.detach().float(), up.weight.detach().float()
    return FeedForward(first.clone(), second.clone(), down.weight.detach().float().clone())


def feed_forward_width(module: nn.Module) -> int:
    """Neurons of a feed-forward, from shapes alone."""
    return _child(module, _DOWN).weight.shape[1]


def has_feed_forward(model: nn.Module, path: str) -> bool:
    """Whether a gated feed-forward stands at a path; none does where an MoE layer was dropped."""
    parent, _, name = path.rpartition(".")
    child = dict(model.get_submodule(parent).named_children()).get(name)
    return child is not None and _is_feed_forward(child)


def shared(model: nn.Module, block: Block) -> list[str]:
    """Paths of the shared experts inside a block's MoE layer; gates that scale them are left out."""
    if block.moe is None:
        return []
    return [path for path in block.moe.shared_experts if _is_feed_forward(model.get_submodule(path))]


def beside(model: nn.Module, block: Block) -> list[str]:
    """Paths of shared experts that stand in the block, beside the MoE layer (Granite's)."""
    return [
        f"{block.name}.{name}"
        for name, child in model.get_submodule(block.name).named_children()
        if "shared" in name and _is_feed_forward(child)
    ]


def mlp_prefix(block: nn.Module) -> str:
    """Name of a dense block's feed-forward, with a dot at its end.

    :raises ValueError: it has none, or stores it in a way that is not written
    """
    for name, child in block.named_children():
        if _is_feed_forward(child):
            if _child(child, ("gate_proj",)) is None:
                break
            return f"{name}."
    raise ValueError(f"{type(block).__name__} has no feed-forward of gate_proj, up_proj and down_proj.")
