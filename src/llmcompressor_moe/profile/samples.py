"""Keep some of the tokens that each expert works on, so that other weights can be tried on them later."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.profile.data import require_finite
from llmcompressor_moe.profile.observing import RoutedObserver, observe_batches
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
    """Keeps up to ``per_batch`` tokens per expert and batch."""

    def __init__(self, model: nn.Module, block: Block, per_batch: int) -> None:
        super().__init__(model, block)
        self._index = block.index
        self._per_batch = per_batch
        self._kept: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = [
            [] for _ in range(self._count)
        ]
        self._sums = torch.zeros(2, self._count, dtype=torch.float64)
        # Tokens, squared norm of the experts' output.
        self._power = torch.zeros(2, dtype=torch.float64)

    def on_expert(
        self, index: int, inputs: torch.Tensor, weights: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Count, and keep an even choice."""
        if not len(inputs):
            return
        gates = weights.float()
        self._sums[0, index] += len(inputs)
        self._sums[1, index] += gates.double().square().sum().cpu()
        count = min(len(inputs), self._per_batch)
        chosen = torch.linspace(0, len(inputs) - 1, count, device=inputs.device).round().long()
        self._kept[index].append((inputs[chosen].cpu(), gates[chosen].cpu(), outputs[chosen].cpu()))

    def after_layer(self, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Add up the power of the experts' output."""
        self._power[0] += len(tokens)
        self._power[1] += output.float().square().sum(dtype=torch.float64).cpu()

    def accumulators(self) -> list[torch.Tensor]:
        """Tensors to be summed over ranks."""
        return [self._sums, self._power]

    def sample(self, hidden: int) -> LayerSample:
        """What was kept.

        :raises FloatingPointError: the layer's output is NaN or infinite
        """
        tokens, output = self._power.tolist()
        require_finite(output, "power of expert outputs", self._index)
        experts = []
        for index, kept in enumerate(self._kept):
            empty = torch.zeros(0, hidden)
            inputs, weights, outputs = (
                (torch.cat(parts) for parts in zip(*kept, strict=True))
                if kept
                else (empty, torch.zeros(0), empty)
            )
            count, squared = self._sums[:, index].tolist()
            experts.append(ExpertSample(inputs, weights, outputs, int(count), squared))
        return LayerSample(experts, int(tokens), output / max(tokens, 1.0))


def collect_samples(
    model: PreTrainedModel,
    topology: Topology,
    batches: Sequence[dict[str, Any]],
    tokens_per_expert: int,
    *,
    skip_layers: Collection[int] = (),
) -> dict[int, LayerSample]:
    """Run ``model`` once over ``batches``, experts on routed tokens only, and keep samples of their work.

    An expert that many tokens go to is sampled evenly over all batches; of a rare one everything is kept that
    a batch's quota allows.

    :param tokens_per_expert: tokens to keep per expert, over all batches
    :param skip_layers: MoE layers that do not run any more, dropped blocks included
    :return: block index -> sample
    :raises FloatingPointError: activations are NaN or infinite
    """
    blocks = [block for block in topology.blocks if block.moe and block.index not in set(skip_layers)]
    per_batch = math.ceil(tokens_per_expert / max(len(batches), 1))
    observers = {block.index: _SampleObserver(model, block, per_batch) for block in blocks}
    observe_batches(model, observers.values(), batches, "Measuring experts")
    hidden = model.get_input_embeddings().weight.shape[-1]
    return {index: observer.sample(hidden) for index, observer in observers.items()}
