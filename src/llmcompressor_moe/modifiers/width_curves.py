"""How narrow experts of each layer become, by what the model's output loses with it: ``scope="sensitivity"``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmcompressor_moe.counts import (
    allowed_channels,
    choose_counts,
    counts_to_measure,
    possible_total,
)
from llmcompressor_moe.criteria.channels import highest
from llmcompressor_moe.modifiers.damage_curves import choose_amounts
from llmcompressor_moe.profile.changes import WithoutChannels
from llmcompressor_moe.report import DropCurves
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["ChannelScores", "NarrowRoom", "channels_of", "choose_widths", "narrow_room"]


@dataclass(frozen=True)
class ChannelScores:
    """A score per channel of each expert of a layer, [width]; the highest stay.

    :param routed: of its routed experts
    :param shared: of shared experts that are cut along
    """

    routed: Sequence[torch.Tensor]
    shared: Mapping[nn.Module, torch.Tensor]


@dataclass(frozen=True)
class NarrowRoom:
    """What the experts of layers may lose, each as many channels as the others of its layer.

    :param width: channels that an expert has
    :param allowed: layer -> numbers of channels
    :param share: what each would lose, were all layers cut alike
    :param total: of all layers
    """

    width: int
    allowed: Mapping[int, Sequence[int]]
    share: float
    total: int

    def evenly(self) -> dict[int, int]:
        """Layer -> channels, as even as they can be."""
        squares = {
            layer: {count: float(count * count) for count in counts} for layer, counts in self.allowed.items()
        }
        return choose_counts(squares, self.total)

    def measured(self) -> dict[int, list[int]]:
        """Numbers at which each layer is cut to measure."""
        return counts_to_measure(self.allowed, dict.fromkeys(self.allowed, self.share), self.total)


def narrow_room(width: int, step: int, layers: Sequence[int], share: float) -> NarrowRoom | None:
    """None where the mean of the layers is too little for one of them to lose a single step.

    :param width: channels that an expert has
    :param step: what stays is a multiple of it
    :param share: channels that go from each expert, in the mean of the layers
    """
    allowed = dict.fromkeys(layers, allowed_channels(width, step))
    total = possible_total(allowed, int(round(share * len(layers), 6)))
    return NarrowRoom(width, allowed, share, total) if total else None


def choose_widths(
    session: TrimSession,
    batches: Iterable[dict[str, Any]],
    scores: Mapping[int, ChannelScores],
    room: NarrowRoom,
) -> tuple[dict[int, int], DropCurves]:
    """How many channels the experts of each layer lose, so that the sum over layers of the damage that each does
    alone, nothing fitted, is least.

    :param scores: of each layer that may be cut
    :return: layer -> channels, layers that lose none left out; and what was measured
    :raises FloatingPointError: the model's output is NaN or infinite
    """

    def cut(layer: int, gone: int) -> WithoutChannels:
        there, stays = scores[layer], room.width - gone
        routed = torch.stack([_mask(one, room.width, stays) for one in there.routed])
        shared = {expert: _mask(one, room.width, stays) for expert, one in there.shared.items()}
        return WithoutChannels(routed, shared)

    chosen, curves = choose_amounts(session, batches, room.allowed, room.measured(), room.total, cut)
    return {layer: gone for layer, gone in chosen.items() if gone}, curves


def channels_of(own: int, old: int, new: int) -> int:
    """Channels that stay of an expert.

    :param own: channels that it has; a shared expert may have others than routed ones
    :param old: channels that a routed expert has
    :param new: that stay of it
    """
    return new * own // old


def _mask(scores: torch.Tensor, old: int, new: int) -> torch.Tensor:
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[highest(scores, channels_of(len(scores), old, new))] = True
    return kept
