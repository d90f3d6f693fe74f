"""What a forked run computes differently in one block: see `lockstep.Fork`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from llmcompressor_moe.surgery.bypass import bypassed, pass_through, silence
from llmcompressor_moe.surgery.experts import RoutingParts, shown_to_keep
from llmcompressor_moe.topology import MoELayer

__all__ = ["Change", "ExpertInputs", "WithoutBlock", "WithoutChannels", "WithoutExperts", "WithoutLayer"]

# hidden [tokens, hidden], index [tokens, top_k], weights [tokens, top_k]; or only hidden
# [experts * tokens, hidden]. See `profile.experts`.
ExpertInputs = Sequence[torch.Tensor]


class Change:
    """A change of one block for one run at a time. This one changes nothing; override what differs.

    Runs take turns inside a block, and all of them share its experts: whatever `applied` puts in place is taken
    away while a run waits, and experts that a changed run calls are the block's own.

    :ivar kept_channels: boolean [experts, width], the channels of routed experts that the changed run's tokens
        pass through; None: all
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.kept_channels: torch.Tensor | None = None

    def applied(self) -> contextlib.AbstractContextManager[Any]:
        """In place while the run computes inside the block, its experts left out."""
        return contextlib.nullcontext()

    def forward(self, block: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        """What runs instead of the block's forward."""
        return own

    def at_experts(self, inputs: ExpertInputs) -> tuple[ExpertInputs, Callable[[torch.Tensor], torch.Tensor]]:
        """From a call of experts by the changed block to one of the block's own experts.

        :return: the call, and a function from what they return to what the changed block gets
        """
        return inputs, _unchanged

    def enter(self) -> None:
        """The run goes on inside the block."""
        self._stack.enter_context(self.applied())

    def leave(self) -> None:
        """The run waits, or has left the block; a second call does nothing."""
        self._stack.close()


class WithoutExperts(Change):
    """The block with only some of its routed experts, the router cut to match, as `surgery.experts.keep_experts`
    leaves it.

    :param parts: of the MoE layer
    :param kept: indices among its experts, ascending
    """

    def __init__(self, parts: RoutingParts, kept: Sequence[int]) -> None:
        super().__init__()
        self._parts, self._kept = parts, list(kept)

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Router and expert counts of the cut layer."""
        return shown_to_keep(self._parts, self._kept)

    def at_experts(self, inputs: ExpertInputs) -> tuple[ExpertInputs, Callable[[torch.Tensor], torch.Tensor]]:
        """Indices among all experts; or rows for all experts, zero (not routed) for those that are gone."""
        if len(inputs) == 1:
            (hidden,) = inputs
            of_kept = hidden.view(len(self._kept), -1, hidden.shape[-1])
            of_all = of_kept.new_zeros(self._parts.num_experts, *of_kept.shape[1:])
            of_all[self._kept] = of_kept
            return (of_all.flatten(0, 1),), self._rows_of_kept
        hidden, index, weights = inputs
        # Families that may skip name one past the last expert.
        names = [*self._kept, self._parts.num_experts]
        return (
            hidden,
            torch.tensor(names, dtype=index.dtype, device=index.device)[index],
            weights,
        ), _unchanged

    def _rows_of_kept(self, output: torch.Tensor) -> torch.Tensor:
        return output.view(self._parts.num_experts, -1, output.shape[-1])[self._kept].flatten(0, 1)


class WithoutChannels(Change):
    """The block with fewer channels in its experts, as `surgery.width.keep_channels` leaves them.

    :param routed: boolean [experts, width], True for channels that stay
    :param shared: shared expert, which has a ``down_proj`` -> the same for its own channels, [width]
    """

    def __init__(self, routed: torch.Tensor, shared: Mapping[nn.Module, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.kept_channels = routed
        self._shared = dict(shared or {})

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Shared experts, which the block runs itself, without their channels."""
        with contextlib.ExitStack() as stack:
            for expert, kept in self._shared.items():
                handle = expert.down_proj.register_forward_pre_hook(functools.partial(_silence, ~kept))
                stack.callback(handle.remove)
            yield


class WithoutLayer(Change):
    """The block with nothing from its MoE layer, shared experts included."""

    def __init__(self, model: nn.Module, moe: MoELayer) -> None:
        """
        :raises ValueError: router and experts stand in the block itself, which does more than they do
        """
        super().__init__()
        if moe.inline:
            raise ValueError(f"{moe.module} holds its router and experts directly: skip the whole block.")
        self._moe = model.get_submodule(moe.module)
        self._forward = silence(self._moe)

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Zeros in place of the layer."""
        return bypassed(self._moe, self._forward)


class WithoutBlock(Change):
    """No block: its input is handed on."""

    def forward(self, block: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        """Returns its input."""
        return pass_through(block)


def _silence(gone: torch.Tensor, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].masked_fill(gone.to(args[0].device), 0), *args[1:])


def _unchanged(output: torch.Tensor) -> torch.Tensor:
    return output
