"""What calibration data says about experts and their neurons, and what the layers make of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from llmcompressor_moe.profile.observing import (
    Observer,
    RoutedObserver,
    first_tensor,
    hidden_argument,
    observe_batches,
)
from llmcompressor_moe.profile.tally import Tally
from llmcompressor_moe.recovery.dense.parts import FeedForward, shared
from llmcompressor_moe.topology import Block, Topology, expert_modules

__all__ = ["LayerUsage", "collect_usage", "fit_outputs"]


@dataclass(frozen=True)
class LayerUsage:
    """Sums over calibration tokens in one MoE layer.

    :param tokens: tokens seen
    :param gate_weight: [experts] sum of the router's weights over routed tokens
    :param neuron_output: [experts, neurons] sum over routed tokens of router weight * |activation|
    :param factors: what the layer multiplies its experts' weighted sum with, then each shared expert's output:
        least squares over all tokens (1 where the layer just adds them, the mean gate where gates scale them)
    """

    tokens: int
    gate_weight: torch.Tensor
    neuron_output: torch.Tensor
    factors: tuple[float, ...]

    @property
    def mean_weight(self) -> torch.Tensor:
        """[experts]: the mean over all tokens of the router's weight, 0 where it chooses another expert."""
        return self.gate_weight / max(self.tokens, 1)


class _UsageObserver(RoutedObserver):
    def __init__(self, model: nn.Module, block: Block) -> None:
        super().__init__(model, block)
        modules = expert_modules(self._experts)
        self._downs = [module.down_proj for module in modules]
        self._moe = model.get_submodule(block.moe.module)
        self._shared = [model.get_submodule(path) for path in shared(model, block)]
        width = self._downs[0].weight.shape[1]
        self._block = block.index
        self._inner: dict[int, torch.Tensor] = {}
        # (batch, part) -> what it gave
        self._parts: dict[tuple[int, int], torch.Tensor] = {}
        self._gate_weight = Tally(len(modules))
        self._neuron_output = Tally(len(modules), width)
        self._products = Tally(1 + len(self._shared), 2 + len(self._shared))
        self._tokens = torch.zeros(1, dtype=torch.float64)

    def accumulators(self) -> list[torch.Tensor]:
        tallies = (self._gate_weight, self._neuron_output, self._products)
        return [*(tally.total for tally in tallies), self._tokens]

    def block_done(self, block: int) -> None:
        if block == self._block:
            self.accumulators()

    def attach(self) -> list[RemovableHandle]:
        handles = super().attach()
        for index, down in enumerate(self._downs):
            handles.append(down.register_forward_pre_hook(self._keep_inner(index)))
        for index, module in enumerate([self._experts, *self._shared]):
            handles.append(module.register_forward_hook(self._keep_part(index)))
        return [*handles, self._moe.register_forward_hook(self._add_products)]

    def _keep_inner(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._inner[index] = args[0]

        return hook

    def _keep_part(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._parts[self._batch, index] = first_tensor(output)

        return hook

    def on_expert(
        self, index: int, inputs: torch.Tensor, weights: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        inner = self._inner.pop(index)
        self._gate_weight.add(weights.sum(dtype=torch.float64), index)
        self._neuron_output.add((inner.abs().float() * weights.float()[:, None]).sum(dim=0), index)

    def _add_products(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        whole = first_tensor(output)
        parts = [self._parts.pop((self._batch, index)) for index in range(1 + len(self._shared))]
        rows = [part.reshape(-1).double() for part in parts]
        columns = [*rows, whole.reshape(-1).double()]
        self._products.add(torch.stack([torch.stack([(a * b).sum() for b in columns]) for a in rows]))
        self._tokens += whole.numel() // whole.shape[-1]

    def usage(self) -> LayerUsage:
        left, right = self._products.total[:, :-1], self._products.total[:, -1]
        factors = torch.linalg.pinv(left, hermitian=True) @ right
        return LayerUsage(
            int(self._tokens), self._gate_weight.total, self._neuron_output.total, tuple(factors.tolist())
        )


def collect_usage(
    model: PreTrainedModel, topology: Topology, batches: Iterable[dict[str, Any]]
) -> dict[int, LayerUsage]:
    """Run a model once over batches without padding.

    :param model: experts linearized
    :return: block index -> what its MoE layer did
    :raises FloatingPointError: activations are NaN or infinite
    """
    observers = {
        block.index: _UsageObserver(model, block) for block in topology.blocks if block.moe is not None
    }
    observe_batches(model, list(observers.values()), batches, "Watching experts")
    found = {index: observer.usage() for index, observer in observers.items()}
    for index, usage in found.items():
        if not bool(usage.neuron_output.isfinite().all()) or not all(map(_finite, usage.factors)):
            raise FloatingPointError(
                f"Calibration gave NaN or infinite activations in block {index}; nothing was written. Check the "
                "weights and the dtype (a model in float16 often overflows: load it in bfloat16)."
            )
    return found


def _finite(value: float) -> bool:
    return bool(torch.tensor(value).isfinite())


class _OutputObserver(Observer):
    """Adds up, for one MoE layer, what a dense feed-forward's neurons say and what they miss."""

    def __init__(self, moe: nn.Module, ffn: FeedForward, act: nn.Module) -> None:
        super().__init__()
        self._moe, self._ffn, self._act = moe, ffn, act
        device = next(moe.parameters()).device
        self.gram = torch.zeros(ffn.width, ffn.width, device=device)
        self.residual = torch.zeros(ffn.width, ffn.down.shape[0], device=device)

    def accumulators(self) -> list[torch.Tensor]:
        return [self.gram, self.residual]

    def attach(self) -> list[RemovableHandle]:
        return [self._moe.register_forward_hook(self._add, with_kwargs=True)]

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = hidden_argument(args, kwargs)
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        wanted = first_tensor(output).reshape(-1, inputs.shape[-1]).float()
        gate, up, down = (value.to(inputs) for value in (self._ffn.gate, self._ffn.up, self._ffn.down))
        inner = self._act(inputs @ gate.T) * (inputs @ up.T)
        self.gram += inner.T @ inner
        self.residual += inner.T @ (wanted - inner @ down.T)


def fit_outputs(
    model: PreTrainedModel,
    topology: Topology,
    batches: Collection[dict[str, Any]],
    merged: Mapping[int, FeedForward],
    act: nn.Module,
    fit: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    memory: int = 8 << 30,
) -> dict[int, FeedForward]:
    """Merged feed-forwards with output weights fitted to what the MoE layers put out.

    :param merged: block index -> what it is to become, without what stands beside the MoE layer
    :param act: the activation function
    :param fit: from the gram matrix, the residual and the output weights to new ones; see `refitted_down`
    :param memory: bytes that gram matrices may take at once; the model is run once per so many layers
    """
    done: dict[int, FeedForward] = {}
    for group in _groups({index: 4 * ffn.width**2 for index, ffn in merged.items()}, memory):
        observers = {
            index: _OutputObserver(model.get_submodule(topology.moe_layers[index].module), merged[index], act)
            for index in group
        }
        observe_batches(model, list(observers.values()), batches, "Fitting outputs")
        for index, observer in observers.items():
            ffn = merged[index]
            down = fit(observer.gram, observer.residual, ffn.down.to(observer.gram)).to(ffn.down)
            done[index] = FeedForward(ffn.gate, ffn.up, down)
    return done


def _groups(sizes: Mapping[int, int], limit: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room = 0
    for index, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(index)
        room -= size
    return groups
