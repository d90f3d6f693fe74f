"""Hooks that turn a forward pass into sums. One observer per kind of part."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llmcompressor_moe.profile.data import ExpertProfile, Statistic, require_finite
from llmcompressor_moe.profile.observing import Observer, RoutedObserver, first_tensor, hidden_argument
from llmcompressor_moe.profile.routers import RouterReader
from llmcompressor_moe.topology import Block, expert_modules

__all__ = ["BlockObserver", "ExpertsObserver", "RunObserver"]

# Redundancy runs every expert on the same tokens, so it looks at a sample of them.
_REDUNDANCY_TOKENS_PER_BATCH = 16


def similarity_sum(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Sum over tokens of the cosine between two [batch, sequence, hidden] tensors, computed in fp32, summed
    in fp64.

    Families with several residual streams ([batch, sequence, streams, hidden]) are compared over all of them
    at once.
    """
    before, after = (values.flatten(2) if values.ndim > 3 else values for values in (before, after))
    cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
    if mask is not None and mask.numel() == cosine.numel():
        cosine = cosine.reshape(-1)[mask.reshape(-1)]
    return torch.stack(
        [cosine.sum(dtype=torch.float64), torch.tensor(float(cosine.numel()), device=cosine.device)]
    )


class BlockObserver(Observer):
    """Cosine of the residual stream over each block and over each MoE layer (arXiv 2406.02500, Layer and
    Block Drop).

    The MoE layer's score compares x, the input of its norm, with y = x + MoE(norm(x)). y is the block's
    output; x is the input of the norm whose output the MoE layer receives. A block that runs attention and
    MoE side by side has no such x in its stream; there x is y minus the layer's output.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], layers: Sequence[Block]) -> None:
        super().__init__()
        self._modules = {block.index: model.get_submodule(block.name) for block in blocks}
        self._moes = {
            block.index: model.get_submodule(block.moe.module)
            for block in layers
            if block.moe is not None and not block.moe.inline
        }
        self._block_sums = {index: torch.zeros(2, dtype=torch.float64) for index in self._modules}
        self._layer_sums = {index: torch.zeros(2, dtype=torch.float64) for index in self._moes}
        self._input: torch.Tensor | None = None
        self._norm: tuple[torch.Tensor, torch.Tensor] | None = None
        self._moe: tuple[torch.Tensor, torch.Tensor] | None = None

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        handles = []
        for index, block in self._modules.items():
            handles.append(block.register_forward_pre_hook(self._before_block, with_kwargs=True))
            handles.append(block.register_forward_hook(self._after_block(index)))
            if index in self._moes:
                handles.append(self._moes[index].register_forward_hook(self._after_moe, with_kwargs=True))
                handles += [
                    child.register_forward_hook(self._after_norm)
                    for name, child in block.named_children()
                    if "norm" in name
                ]
        return handles

    def accumulators(self) -> list[torch.Tensor]:
        """Tensors to be summed over ranks, in an order that all ranks share."""
        return [*self._block_sums.values(), *self._layer_sums.values()]

    def block_similarity(self) -> dict[int, float]:
        """Mean cosine per block."""
        return {index: _mean(sums) for index, sums in self._block_sums.items()}

    def layer_similarity(self) -> dict[int, float]:
        """Mean cosine per MoE layer."""
        return {index: _mean(sums) for index, sums in self._layer_sums.items()}

    def _before_block(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input, self._norm, self._moe = hidden_argument(args, kwargs), None, None

    def _after_norm(self, _module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if self._moe is None:
            self._norm = (first_tensor(args), output)

    def _after_moe(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        received = hidden_argument(args, kwargs)
        before = received
        if self._norm is not None and self._norm[1].data_ptr() == received.data_ptr():
            before = self._norm[0]
        self._moe = (before, first_tensor(output))

    def _after_block(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            after = first_tensor(output)
            self._block_sums[index] += similarity_sum(self._input, after, self._mask).cpu()
            if self._moe is not None and index in self._layer_sums:
                before, moe_output = self._moe
                if before.numel() != after.numel():
                    # Several residual streams: the layer reads one mixture of them, and adds to that.
                    before = before.reshape(*after.shape[:2], -1)
                    after = before + moe_output.reshape_as(before)
                elif before.data_ptr() == self._input.data_ptr():
                    before = after - moe_output.reshape_as(after)
                self._layer_sums[index] += similarity_sum(before.reshape_as(after), after, self._mask).cpu()
            self._input = self._norm = self._moe = None

        return hook


class RunObserver(Observer):
    """Cosine of the residual stream over every run of ``length`` consecutive blocks."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], length: int) -> None:
        super().__init__()
        self._indices = [block.index for block in blocks]
        self._modules = [model.get_submodule(block.name) for block in blocks]
        self._length = length
        self._sums = {
            index: torch.zeros(2, dtype=torch.float64) for index in self._indices[: len(blocks) - length + 1]
        }
        # (position, batch) -> input of the block there; kept until the run that starts there has ended.
        self._inputs: dict[tuple[int, int], torch.Tensor] = {}

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        handles = []
        for position, module in enumerate(self._modules):
            handles.append(module.register_forward_pre_hook(self._before(position), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(position)))
        return handles

    def accumulators(self) -> list[torch.Tensor]:
        """Tensors to be summed over ranks, in an order that all ranks share."""
        return list(self._sums.values())

    def similarity(self) -> dict[int, float]:
        """First block of a run -> mean cosine."""
        return {index: _mean(sums) for index, sums in self._sums.items()}

    def _before(self, position: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._indices[position] in self._sums:
                hidden = hidden_argument(args, kwargs)
                # Block by block, all batches wait here at once: keep them off the accelerator.
                waiting = any(batch != self._batch for _, batch in self._inputs)
                self._inputs[position, self._batch] = hidden.cpu() if waiting else hidden

        return hook

    def _after(self, position: int) -> Any:
        first = position - self._length + 1

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if first >= 0:
                after = first_tensor(output)
                before = self._inputs.pop((first, self._batch)).to(after.device)
                sums = similarity_sum(before, after, self._mask).cpu()
                self._sums[self._indices[first]] += sums

        return hook


class ExpertsObserver(RoutedObserver):
    """Routing and outputs of the experts of one MoE layer; runs them on routed tokens only."""

    def __init__(self, model: nn.Module, block: Block, wanted: Collection[Statistic]) -> None:
        super().__init__(model, block)
        moe = block.moe
        self._block = block.index
        self._router = model.get_submodule(moe.router) if moe.router else None
        self._scores = RouterReader(self._router, moe.num_experts, model.config) if moe.router else None
        # With groups, the softmax also counts experts that could not be chosen.
        self._limited = moe.groups_kept < moe.num_groups
        self._outputs = Statistic.OUTPUT in wanted
        self._redundancy = Statistic.REDUNDANCY in wanted
        count = moe.num_experts
        self._sums = torch.zeros(5, count, dtype=torch.float64)
        self._similarity = torch.zeros(count + 1, count, dtype=torch.float64)
        # Not finite as soon as one output is not, whatever else is collected.
        self._output_total = torch.zeros(1, dtype=torch.float64)
        self._device_sums: torch.Tensor | None = None

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        super().attach()
        return [self._router.register_forward_hook(self._after_router)] if self._router is not None else []

    def accumulators(self) -> list[torch.Tensor]:
        """Tensors to be summed over ranks, in an order that all ranks share."""
        if self._device_sums is not None:
            self._sums += self._device_sums[:-1].cpu()
            self._output_total += self._device_sums[-1, :1].cpu()
            self._device_sums = None
        return [self._sums, self._similarity, self._output_total]

    def profile(self) -> ExpertProfile:
        """The layer's statistics.

        :raises FloatingPointError: the experts' output is NaN or infinite
        """
        require_finite(float(self._output_total), "sum of expert outputs", self._block)
        tokens, gate, probability, norm, weighted = self._sums.tolist()
        similarity = self._similarity[:-1] / self._similarity[-1].clamp(min=1)
        return ExpertProfile(
            routed_tokens=[int(count) for count in tokens],
            gate_weight=gate,
            # Read off the sums, not off this rank's router: another rank may have seen all the tokens.
            routing_probability=probability if any(probability) else None,
            output_norm=norm if self._outputs else None,
            weighted_output_norm=weighted if self._outputs else None,
            output_similarity=similarity.tolist() if self._redundancy else None,
        )

    def on_expert(
        self, index: int, inputs: torch.Tensor, weights: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Add up counts, router weights and norms."""
        accumulator = self._accumulator(outputs.device)
        accumulator[0, index] += len(outputs)
        accumulator[1, index] += weights.sum(dtype=torch.float64)
        if self._outputs:
            norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)
            accumulator[3, index] += norms.sum(dtype=torch.float64)
            accumulator[4, index] += (weights.float() * norms).sum(dtype=torch.float64)

    def after_layer(self, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Keep what tells of NaN, and compare the experts on a sample."""
        self._accumulator(output.device)[5, 0] += output.sum(dtype=torch.float64)
        if self._redundancy:
            self._compare(tokens)

    def _accumulator(self, device: torch.device) -> torch.Tensor:
        if self._device_sums is None:
            self._device_sums = torch.zeros(6, self._sums.shape[1], dtype=torch.float64, device=device)
        return self._device_sums

    def _after_router(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        probability = None if self._limited else self._scores.probabilities(output)
        if probability is None:
            return
        keep = self.kept(len(probability))
        if keep is not None:
            probability = probability[keep]
        self._accumulator(probability.device)[2] += probability.sum(dim=0, dtype=torch.float64)

    def _compare(self, tokens: torch.Tensor) -> None:
        """Run all experts on an even sample of the batch's tokens and add up the cosines of their outputs."""
        count = min(len(tokens), _REDUNDANCY_TOKENS_PER_BATCH)
        sample = tokens[torch.linspace(0, len(tokens) - 1, count, device=tokens.device).long()]
        outputs = torch.stack([module(sample) for module in expert_modules(self._experts)]).float()
        unit = torch.nn.functional.normalize(outputs, dim=-1)
        cosines = torch.einsum("eth,fth->ef", unit, unit)
        self._similarity[:-1] += cosines.double().cpu()
        self._similarity[-1] += len(sample)


def _mean(sums: torch.Tensor) -> float:
    return float(sums[0] / sums[1]) if sums[1] else float("nan")
