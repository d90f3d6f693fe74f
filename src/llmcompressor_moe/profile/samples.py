"""Keep some of the tokens that each expert works on, so that other weights can be tried on them later."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.profile.data import require_finite
from llmcompressor_moe.profile.experts import sums_by_expert
from llmcompressor_moe.profile.forward import sum_over_ranks
from llmcompressor_moe.profile.observing import RoutedObserver, observe_batches
from llmcompressor_moe.profile.tally import Tally
from llmcompressor_moe.topology import Block, Topology

__all__ = ["ExpertSample", "LayerSample", "collect_samples", "empty_sample"]


@dataclass
class ExpertSample:
    """What one expert did. Counts and sums are over all tokens of all ranks, the kept tokens are this rank's.

    :param inputs: [n, hidden] on the CPU, an even choice among the tokens routed to the expert
    :param weights: [n] their router weights, fp32
    :param outputs: [n, hidden] the expert's output before weighting, on the CPU
    :param routed_tokens: all tokens routed to the expert
    :param squared_weight: sum of squared router weights over all of them
    """

    inputs: torch.Tensor
    weights: torch.Tensor
    outputs: torch.Tensor
    routed_tokens: int
    squared_weight: float


@dataclass
class LayerSample:
    """What the experts of one MoE layer did.

    :param tokens: tokens that entered the layer (padding left out)
    :param output_power: mean over tokens of the squared norm of the experts' weighted sum
    """

    experts: list[ExpertSample]
    tokens: int
    output_power: float


def empty_sample(num_experts: int) -> LayerSample:
    """A sample without data."""
    nothing = torch.zeros(0, 0)
    experts = [ExpertSample(nothing, torch.zeros(0), nothing, 0, 0.0) for _ in range(num_experts)]
    return LayerSample(experts, tokens=0, output_power=0.0)


class _SampleObserver(RoutedObserver):
    """Keeps an even choice of the tokens that each expert works on, until its layer is done."""

    def __init__(
        self,
        model: nn.Module,
        block: Block,
        tokens_per_expert: int,
        all_tokens: int,
        hidden: int,
        dtype: torch.dtype | None,
        on_sample: Callable[[int, LayerSample], None],
    ) -> None:
        """
        :param all_tokens: tokens that will enter the layer, padding included
        :param dtype: see ``keep_in`` of `collect_samples`
        :param on_sample: called with the block's index and the sample
        """
        super().__init__(model, block)
        self._index = block.index
        self._tokens_per_expert, self._all_tokens = tokens_per_expert, all_tokens
        self._hidden, self._dtype, self._on_sample = hidden, dtype, on_sample
        self._quota = 0
        self._counts = [0] * self._count
        self._weights: list[torch.Tensor] = []
        self._kept: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = [
            [] for _ in range(self._count)
        ]
        # Tokens, squared router weights.
        self._sums = Tally(2, self._count)
        # Tokens, squared norm of the experts' output.
        self._power = Tally(2)
        self._done = False

    def before_layer(self, tokens: int) -> None:
        """Let these tokens have their share of what is kept."""
        self._quota = math.ceil(self._tokens_per_expert * tokens / max(self._all_tokens, 1))

    def on_expert(
        self, index: int, inputs: torch.Tensor, weights: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Count, and keep an even choice."""
        gates = weights.float()
        self._counts[index] = len(gates)
        self._weights.append(gates)
        count = min(len(inputs), self._quota)
        chosen = torch.linspace(0, len(inputs) - 1, count, device=inputs.device).round().long()
        dtype = self._dtype or outputs.dtype
        self._kept[index].append((inputs[chosen].to(dtype), gates[chosen], outputs[chosen].to(dtype)))

    def after_layer(self, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Add up weights and the power of the experts' output."""
        if self._weights:
            squares = torch.cat(self._weights).double().square()
            self._sums.add(sums_by_expert(self._counts, torch.stack([torch.ones_like(squares), squares], 1)))
        self._counts = [0] * self._count
        self._weights.clear()
        power = output.float().square().sum(dtype=torch.float64)
        self._power.add(torch.stack([torch.full_like(power, len(tokens)), power]))

    def block_done(self, block: int) -> None:
        """Hand over what was kept of this layer."""
        if block == self._index:
            self.finish()

    def finish(self) -> None:
        """Hand over, if that has not happened (a rank without data takes part in the sums as well).

        :raises FloatingPointError: the layer's output is NaN or infinite
        """
        if not self._done:
            self._done = True
            self._on_sample(self._index, self._sample())

    def _sample(self) -> LayerSample:
        sums, (tokens, power) = sum_over_ranks(self._sums.total), sum_over_ranks(self._power.total).tolist()
        require_finite(power, "power of expert outputs", self._index)
        experts = []
        for kept, (count, squared) in zip(self._kept, sums.T.tolist(), strict=True):
            empty = torch.zeros(0, self._hidden)
            inputs, weights, outputs = (
                (torch.cat(parts).cpu() for parts in zip(*kept, strict=True))
                if kept
                else (empty, torch.zeros(0), empty)
            )
            kept.clear()
            experts.append(ExpertSample(inputs, weights, outputs, int(count), squared))
        return LayerSample(experts, int(tokens), power / max(tokens, 1.0))


def collect_samples(
    model: PreTrainedModel,
    topology: Topology,
    batches: Sequence[dict[str, Any]],
    tokens_per_expert: int,
    *,
    skip_layers: Collection[int] = (),
    keep_in: torch.dtype | None = None,
    on_layer_done: Callable[[int, LayerSample], None] | None = None,
) -> dict[int, LayerSample]:
    """Run ``model`` once over ``batches``, experts on routed tokens only, and keep samples of their work.

    An expert that many tokens go to is sampled evenly over all batches; of a rare one everything is kept.

    :param tokens_per_expert: tokens to keep per expert, over all batches
    :param skip_layers: MoE layers that do not run any more, dropped blocks included
    :param keep_in: dtype of kept inputs and outputs; None: the one that was computed in
    :param on_layer_done: called with a block's index and its sample as soon as all batches have passed it, in the
        same order on all ranks; what it does not keep is freed
    :return: block index -> sample; empty with ``on_layer_done``
    :raises FloatingPointError: activations are NaN or infinite
    """
    blocks = [block for block in topology.blocks if block.moe and block.index not in set(skip_layers)]
    found: dict[int, LayerSample] = {}
    hand_over = on_layer_done or found.__setitem__
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    with disable_onloading():
        hidden = model.get_input_embeddings().weight.shape[-1]
    observers = [
        _SampleObserver(model, block, tokens_per_expert, tokens, hidden, keep_in, hand_over)
        for block in blocks
    ]
    observe_batches(model, observers, batches, "Measuring experts")
    return found
