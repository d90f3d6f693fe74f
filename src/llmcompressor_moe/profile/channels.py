"""What enters the down projections of experts: how strong each channel is, and how channels go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llmcompressor_moe.profile.forward import sum_over_ranks
from llmcompressor_moe.profile.observing import Observer, RoutedObserver, first_tensor
from llmcompressor_moe.topology import Block, expert_modules

__all__ = ["ChannelSums", "RoutedChannels", "SharedChannels"]

# One token in so many is kept to judge by, up to so many of each expert.
_HELD_OUT_EVERY, _HELD_OUT = 8, 256

Done = Callable[[list["ChannelSums"]], None]


class ChannelSums:
    """Sums over the tokens of one expert, of its activations times the router's weight.

    :ivar tokens: how many were added up
    :ivar power: [width] sum of squares, fp64
    :ivar moments: [width, width] sum of outer products, fp32; None where they were not asked for
    :ivar held_out: [tokens, width] activations of other tokens, fp32
    """

    def __init__(self, width: int, moments: bool) -> None:
        self._width, self._wants_moments = width, moments
        self.tokens = 0
        self._seen = 0
        self.power = torch.zeros(width, dtype=torch.float64)
        self.moments: torch.Tensor | None = None
        self._held: list[torch.Tensor] = []

    @property
    def held_out(self) -> torch.Tensor:
        """See the class."""
        return torch.cat(self._held) if self._held else self.power.new_zeros(0, self._width).float()

    def add(self, weighted: torch.Tensor) -> None:
        """Add tokens.

        :param weighted: [tokens, width]
        """
        if not len(weighted):
            return
        weighted = weighted.float()
        if self._wants_moments:
            weighted = self._without_held_out(weighted)
            if self.moments is None:
                self.moments = weighted.new_zeros(self._width, self._width)
            self.moments.addmm_(weighted.T, weighted)
        self.tokens += len(weighted)
        self.power = self.power.to(weighted.device)
        self.power += weighted.square().sum(dim=0, dtype=torch.float64)

    def over_ranks(self) -> None:
        """Sum over all ranks; tokens to judge by stay those of this rank."""
        self.tokens = int(sum_over_ranks(torch.tensor(self.tokens)))
        self.power = sum_over_ranks(self.power)
        if self._wants_moments:
            own = self.moments if self.moments is not None else torch.zeros(self._width, self._width)
            self.moments = sum_over_ranks(own)

    def _without_held_out(self, weighted: torch.Tensor) -> torch.Tensor:
        place = torch.arange(self._seen, self._seen + len(weighted), device=weighted.device)
        self._seen += len(weighted)
        held = place % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        room = _HELD_OUT - sum(map(len, self._held))
        held &= torch.cumsum(held, 0) <= room
        if room > 0:
            self._held.append(weighted[held])
        return weighted[~held]


class RoutedChannels(RoutedObserver):
    """Channels of the routed experts of one MoE layer.

    :param moments: whether to add up second moments: width² numbers per expert, for one layer at a time
    :param on_done: called with the sums of all experts when all batches have passed the block, after which the
        experts do not run again in this pass: they may be changed
    """

    def __init__(self, model: nn.Module, block: Block, moments: bool, on_done: Done) -> None:
        super().__init__(model, block)
        self._block, self._wants_moments, self._on_done = block.index, moments, on_done
        self._sums: list[ChannelSums] | None = None
        self._entered: torch.Tensor | None = None

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        handles = super().attach()
        return handles + [
            expert.down_proj.register_forward_pre_hook(self._before_down)
            for expert in expert_modules(self._experts)
        ]

    def on_expert(
        self, index: int, inputs: torch.Tensor, weights: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Add one expert's tokens."""
        entered = self._entered[: len(weights)]
        self._own_sums()[index].add(entered.float() * weights[:, None].float())

    def block_done(self, block: int) -> None:
        """Hand the sums over."""
        if block == self._block:
            sums, self._sums, self._entered = self._own_sums(), None, None
            for one in sums:
                one.over_ranks()
            self._on_done(sums)

    def _before_down(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._entered = first_tensor(args)

    def _own_sums(self) -> list[ChannelSums]:
        if self._sums is None:
            widths = [expert.down_proj.in_features for expert in expert_modules(self._experts)]
            self._sums = [ChannelSums(width, self._wants_moments) for width in widths]
        return self._sums


class SharedChannels(Observer):
    """Channels of a shared expert, which every token passes with the weight 1.

    :param expert: has a ``down_proj``
    :param block: index of its block
    :param on_done: see `RoutedChannels`
    """

    def __init__(self, expert: nn.Module, block: int, moments: bool, on_done: Done) -> None:
        super().__init__()
        self._expert, self._block, self._wants_moments, self._on_done = expert, block, moments, on_done
        self._sums: ChannelSums | None = None

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        return [self._expert.down_proj.register_forward_pre_hook(self._before_down)]

    def block_done(self, block: int) -> None:
        """Hand the sums over."""
        if block == self._block:
            sums, self._sums = self._own_sums(), None
            sums.over_ranks()
            self._on_done([sums])

    def _before_down(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        entered = first_tensor(args).flatten(0, -2)
        mask = self._mask
        if mask is not None and mask.numel() == len(entered):
            entered = entered[mask.reshape(-1).to(entered.device)]
        self._own_sums().add(entered)

    def _own_sums(self) -> ChannelSums:
        if self._sums is None:
            self._sums = ChannelSums(self._expert.down_proj.in_features, self._wants_moments)
        return self._sums
