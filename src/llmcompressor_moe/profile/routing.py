"""What the routers of a model decide on given batches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from llmcompressor_moe.profile.observing import (
    Observer,
    RoutedObserver,
    hidden_argument,
    observe_batches,
)
from llmcompressor_moe.profile.routers import RouterReader
from llmcompressor_moe.topology import Block, Topology

__all__ = ["RouterTrace", "trace_routing"]


@dataclass
class RouterTrace:
    """One router's decisions, on the CPU.

    :param chosen: boolean [tokens, experts]
    :param probabilities: [tokens, experts] over all experts, fp32; None where the router has no softmax
    """

    chosen: torch.Tensor
    probabilities: torch.Tensor | None


class _RoutingObserver(RoutedObserver):
    def __init__(self, model: nn.Module, block: Block) -> None:
        super().__init__(model, block)
        router = model.get_submodule(block.moe.router) if block.moe.router else None
        self._router = router
        self._reader = (
            RouterReader(router, block.moe.num_experts, model.config) if router is not None else None
        )
        self._block = block.index
        self._chosen: list[torch.Tensor] = []
        self._probabilities: list[torch.Tensor] = []

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        if isinstance(self._experts, LinearExperts2D):
            handles = super().attach()
        else:
            # Fused experts run as they are: what was chosen is among their arguments.
            handles = [self._experts.register_forward_pre_hook(self._before_experts, with_kwargs=True)]
        if self._router is not None:
            handles.append(self._router.register_forward_hook(self._after_router))
        return handles

    def __exit__(self, *exc: object) -> None:
        if isinstance(self._experts, LinearExperts2D):
            super().__exit__(*exc)
        else:
            Observer.__exit__(self, *exc)

    def on_routing(self, chosen: torch.Tensor) -> None:
        """Keep the choice."""
        self._chosen.append(chosen)

    def block_done(self, block: int) -> None:
        """Move what is kept to the CPU."""
        if block == self._block:
            self._chosen, self._probabilities = _on_cpu(self._chosen), _on_cpu(self._probabilities)

    def trace(self) -> RouterTrace:
        """Everything that was kept."""
        chosen = torch.cat(self._chosen) if self._chosen else torch.zeros(0, self._count, dtype=torch.bool)
        together = torch.cat(self._probabilities) if self._probabilities else None
        return RouterTrace(
            chosen, together if together is not None and len(together) == len(chosen) else None
        )

    def _before_experts(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_argument(args, kwargs)
        index = args[1] if len(args) > 1 else kwargs.get("top_k_index")
        flat = hidden.reshape(-1, hidden.shape[-1])
        tokens = len(flat) if index is not None else len(flat) // self._count
        chosen, keep = self._choice(flat, index, tokens), self.kept(tokens)
        self.on_routing(chosen if keep is None else chosen[keep.to(chosen.device)])

    def _after_router(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        values = self._reader.probabilities(output)
        if values is None:
            return
        keep = self.kept(len(values))
        self._probabilities.append(values if keep is None else values[keep.to(values.device)])


def _on_cpu(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(values).cpu()] if values else []


def trace_routing(
    model: PreTrainedModel,
    topology: Topology,
    batches: Sequence[dict[str, Any]],
    *,
    skip_layers: Collection[int] = (),
    quantized: bool = False,
) -> dict[int, RouterTrace]:
    """Run ``model`` once over ``batches`` and keep what its routers decide.

    Its experts may be linearized or fused.

    :param skip_layers: MoE layers that do not run any more
    :param quantized: run quantized modules as they will be served
    :return: block index -> trace of this rank's batches
    """
    blocks = [block for block in topology.blocks if block.moe and block.index not in set(skip_layers)]
    observers = {block.index: _RoutingObserver(model, block) for block in blocks}
    observe_batches(model, observers.values(), batches, "Watching routers", quantized=quantized)
    return {index: observer.trace() for index, observer in observers.items()}
