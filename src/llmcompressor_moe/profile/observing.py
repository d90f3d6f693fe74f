"""Hooks that live as long as a pass, and experts that run on routed tokens while somebody watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from llmcompressor_moe.profile.experts import routed_forward, scattered_forward
from llmcompressor_moe.profile.forward import batch_mask, run_batches, sum_over_ranks
from llmcompressor_moe.profile.lockstep import Snapshot
from llmcompressor_moe.profile.resumable import ResumablePass, ResumePoint
from llmcompressor_moe.topology import Block

__all__ = [
    "Observer",
    "RoutedObserver",
    "attached",
    "first_tensor",
    "hidden_argument",
    "observe_batches",
]


def first_tensor(values: Any) -> torch.Tensor:
    """The first tensor in a module's arguments or output."""
    if isinstance(values, torch.Tensor):
        return values
    return next(value for value in values if isinstance(value, torch.Tensor))


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a block or an MoE layer."""
    return first_tensor(args) if args else first_tensor([kwargs.get("hidden_states"), *kwargs.values()])


class Observer:
    """Hooks that live as long as the context."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._mask: torch.Tensor | None = None
        self._batch = 0
        self._wave = 1

    def start_batch(self, index: int, mask: torch.Tensor | None) -> None:
        """Note the batch that comes next and its padding mask. Batches take turns, inside a block as well."""
        self._batch, self._mask, self._wave = index, mask, 1

    def start_wave(self, indices: Sequence[int], mask: torch.Tensor | None) -> None:
        """Note the batches whose tokens enter the same experts next, in order, and the padding mask of them all.

        :param mask: boolean [tokens of all batches]
        """
        self._wave, self._mask = len(indices), mask

    def block_done(self, block: int) -> None:
        """All batches have passed the block with this index: what is kept of it can leave the device."""

    def finish(self) -> None:
        """The pass is over."""

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        raise TypeError(f"{type(self).__name__} attaches no hooks")

    def accumulators(self) -> list[torch.Tensor]:
        """Tensors to be summed over ranks, in an order that all ranks share."""
        return []

    def state(self) -> dict[str, torch.Tensor]:
        """What it has added up after a whole number of blocks, so that another process can go on."""
        return {str(index): values for index, values in enumerate(self.accumulators())}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from the `state` of an observer of the same kind of the same model."""
        for index, values in enumerate(self.accumulators()):
            values.copy_(state[str(index)])

    def __enter__(self) -> None:
        self._handles = self.attach()

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


class RoutedObserver(Observer):
    """Runs the experts of one MoE layer on routed tokens only and shows each expert's work to `on_expert`."""

    def __init__(self, model: nn.Module, block: Block) -> None:
        super().__init__()
        self._experts: LinearExperts2D = model.get_submodule(block.moe.experts)
        self._count = block.moe.num_experts
        self._own_forward: Any = None

    def attach(self) -> list[RemovableHandle]:
        """Put the watched forward in place."""
        # An instance attribute shadows the method for the time of the pass and leaves the class alone.
        self._own_forward = self._experts.__dict__.get("forward")
        self._experts.forward = self._forward
        return []

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        del self._experts.forward
        if self._own_forward is not None:
            self._experts.forward = self._own_forward

    def before_layer(self, tokens: int) -> None:
        """Experts are about to see the tokens of one or more batches.

        :param tokens: padding included
        """

    def on_expert(
        self, index: int, inputs: torch.Tensor, weights: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """One expert's work on the tokens of one or more batches, padding left out; not called without any.

        :param inputs: [n, hidden]
        :param weights: [n] router weights (1 where the router scales the input instead)
        :param outputs: [n, hidden], before weighting
        """

    def on_routing(self, chosen: torch.Tensor) -> None:
        """The router's choice.

        :param chosen: boolean [tokens, experts], padding left out
        """

    def after_layer(self, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """The whole layer's work.

        :param tokens: [tokens, hidden] what entered the experts, padding left out
        :param output: [tokens, hidden] the experts' weighted sum
        """

    def kept(self, tokens: int) -> torch.Tensor | None:
        """Boolean [tokens], False for padding; None when there is none."""
        mask = self._mask
        return mask.reshape(-1) if mask is not None and mask.numel() == tokens else None

    def _forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens = len(flat) if top_k_index is not None else len(flat) // self._count
        keep = self.kept(tokens)
        if keep is not None:
            keep = keep.to(flat.device)
        self.before_layer(tokens)

        def watch(
            index: int, _: torch.Tensor, inputs: torch.Tensor, weights: torch.Tensor, outputs: torch.Tensor
        ) -> None:
            self.on_expert(index, inputs, weights, outputs)

        if top_k_index is not None:
            result = routed_forward(self._experts, flat, top_k_index, top_k_weights, watch, keep)
            entered, summed = flat, result
        else:
            result = scattered_forward(self._experts, flat, watch, keep)
            # Every expert has its own copy of a token, zero where it is not routed.
            entered = flat.view(self._count, tokens, -1).abs().amax(dim=0)
            summed = result.view(self._count, tokens, -1).sum(dim=0)
        chosen = self._choice(flat, top_k_index, tokens)
        if keep is not None:
            chosen, entered, summed = chosen[keep], entered[keep], summed[keep]
        self.on_routing(chosen)
        self.after_layer(entered, summed)
        return result.reshape_as(hidden_states)

    def _choice(self, flat: torch.Tensor, top_k_index: torch.Tensor | None, tokens: int) -> torch.Tensor:
        if top_k_index is None:
            return flat.view(self._count, tokens, -1).ne(0).any(dim=-1).T
        # One column more: some families route to an index behind the last expert when they skip.
        chosen = torch.zeros(tokens, self._count + 1, dtype=torch.bool, device=flat.device)
        chosen.scatter_(1, top_k_index.reshape(tokens, -1).clamp(max=self._count), True)
        return chosen[:, : self._count]


@contextlib.contextmanager
def attached(observers: Collection[Observer]) -> Iterator[None]:
    """Let observers watch while the context is open."""
    with contextlib.ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer)
        yield


def observe_batches(
    model: PreTrainedModel,
    observers: Collection[Observer],
    batches: Iterable[dict[str, Any]],
    description: str,
    *,
    quantized: bool = False,
    on_batch: Callable[[int, dict[str, Any]], None] | None = None,
    on_logits: Callable[[int, torch.Tensor], None] | None = None,
    resumable: ResumablePass | None = None,
) -> None:
    """Run ``model`` once over ``batches`` while observers watch; what they add up is summed over all ranks.

    :param description: beside the progress bar
    :param quantized: run quantized modules as they will be served
    :param on_batch: called with each batch and its index before the model sees it
    :param on_logits: see `run_batches`
    :param resumable: where the pass is kept, and goes on; all observers must have a `state`
    :raises OSError: a snapshot cannot be written
    """
    masks = _Masks()
    watching = list(observers)
    point = resumable.start() if resumable is not None else ResumePoint(0, None, None)

    def start(index: int, batch: dict[str, Any]) -> None:
        if not masks.add(index, batch):
            # Hooks of blocks that are handed over have run by now, for every batch: what they saw is replaced.
            point.load(watching)
        elif on_batch is not None:
            on_batch(index, batch)
        for observer in observers:
            observer.start_batch(index, masks[index])

    def start_wave(indices: Sequence[int]) -> None:
        mask = masks.together(indices)
        for observer in observers:
            observer.start_wave(indices, mask)

    def done(block: int, snapshot: Snapshot) -> None:
        for observer in observers:
            observer.block_done(block)
        if resumable is not None:
            resumable.block_done(block, snapshot, watching)

    with attached(observers):
        run_batches(
            model,
            batches,
            start,
            description,
            quantized=quantized,
            on_wave=start_wave,
            on_logits=on_logits,
            on_block_done=done,
            start_block=point.block,
            resume=point.outputs,
        )
    point.load(watching)
    for observer in observers:
        observer.finish()
        for accumulator in observer.accumulators():
            accumulator.copy_(sum_over_ranks(accumulator))


class _Masks:
    """Padding masks of batches, each made once."""

    def __init__(self) -> None:
        self._masks: dict[int, torch.Tensor | None] = {}
        self._ids: dict[int, torch.Tensor] = {}

    def add(self, index: int, batch: dict[str, Any]) -> bool:
        """Whether the batch is new."""
        if index in self._masks:
            return False
        self._masks[index], self._ids[index] = batch_mask(batch), batch["input_ids"]
        return True

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self._masks[index]

    def together(self, indices: Sequence[int]) -> torch.Tensor | None:
        """Boolean [tokens of all these batches], None when nothing is padded."""
        masks = [self._masks[index] for index in indices]
        if all(mask is None for mask in masks):
            return None
        return torch.cat(
            [
                torch.ones_like(self._ids[index], dtype=torch.bool).flatten()
                if mask is None
                else mask.flatten()
                for index, mask in zip(indices, masks, strict=True)
            ]
        )
