"""Hooks that turn a forward pass into sums. One observer per kind of part."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llmcompressor_moe.profile.data import ExpertProfile, Statistic, require_finite
from llmcompressor_moe.profile.experts import sums_by_expert
from llmcompressor_moe.profile.observing import Observer, RoutedObserver, first_tensor, hidden_argument
from llmcompressor_moe.profile.routers import RouterReader
from llmcompressor_moe.profile.tally import Tally
from llmcompressor_moe.topology import Block, expert_modules

__all__ = ["BlockObserver", "ExpertsObserver", "RunObserver"]

# Redundancy runs every expert on the same tokens, so it looks at a sample of them.
_REDUNDANCY_TOKENS_PER_BATCH = 16
# Of all experts' outputs that are held at once, in fp32: 512 MB.
_REDUNDANCY_VALUES = 1 << 27


def similarity_sum(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Sum over tokens of the cosine between two [batch, sequence, hidden] tensors, computed in fp32, summed
    in fp64, and the number of tokens.

    Families with several residual streams ([batch, sequence, streams, hidden]) are compared over all of them
    at once.
    """
    before, after = (values.flatten(2) if values.ndim > 3 else values for values in (before, after))
    cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1).double()
    count = cosine.new_full((), cosine.numel())
    if mask is not None and mask.numel() == cosine.numel():
        keep = mask.to(cosine.device).reshape_as(cosine)
        cosine, count = torch.where(keep, cosine, 0.0), keep.sum()
    return torch.stack([cosine.sum(), count.double()])


@dataclass
class _Inside:
    """What one batch has brought into a block.

    :param entered: what entered the block
    :param norm: what entered the last norm, and what it gave
    :param moe: what the MoE layer is compared with, and what it gave
    """

    entered: torch.Tensor
    norm: tuple[torch.Tensor, torch.Tensor] | None = None
    moe: tuple[torch.Tensor, torch.Tensor] | None = None


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
        self._block_sums = {index: Tally(2) for index in self._modules}
        self._layer_sums = {index: Tally(2) for index in self._moes}
        self._inside: dict[int, _Inside] = {}

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
        return [sums.total for sums in (*self._block_sums.values(), *self._layer_sums.values())]

    def block_done(self, block: int) -> None:
        """Move its sums to the CPU."""
        for sums in (self._block_sums, self._layer_sums):
            if block in sums:
                _ = sums[block].total

    def block_similarity(self) -> dict[int, float]:
        """Mean cosine per block."""
        return {index: _mean(sums) for index, sums in self._block_sums.items()}

    def layer_similarity(self) -> dict[int, float]:
        """Mean cosine per MoE layer."""
        return {index: _mean(sums) for index, sums in self._layer_sums.items()}

    def _before_block(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside[self._batch] = _Inside(hidden_argument(args, kwargs))

    def _after_norm(self, _module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        inside = self._inside[self._batch]
        if inside.moe is None:
            inside.norm = (first_tensor(args), output)

    def _after_moe(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        inside = self._inside[self._batch]
        received = hidden_argument(args, kwargs)
        before = received
        if inside.norm is not None and inside.norm[1].data_ptr() == received.data_ptr():
            before = inside.norm[0]
        inside.moe = (before, first_tensor(output))

    def _after_block(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            inside = self._inside.pop(self._batch)
            after = first_tensor(output)
            self._block_sums[index].add(similarity_sum(inside.entered, after, self._mask))
            if inside.moe is not None and index in self._layer_sums:
                before, moe_output = inside.moe
                if before.numel() != after.numel():
                    # Several residual streams: the layer reads one mixture of them, and adds to that.
                    before = before.reshape(*after.shape[:2], -1)
                    after = before + moe_output.reshape_as(before)
                elif before.data_ptr() == inside.entered.data_ptr():
                    before = after - moe_output.reshape_as(after)
                self._layer_sums[index].add(similarity_sum(before.reshape_as(after), after, self._mask))

        return hook


class RunObserver(Observer):
    """Cosine of the residual stream over every run of ``length`` consecutive blocks."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], length: int) -> None:
        super().__init__()
        self._indices = [block.index for block in blocks]
        self._modules = [model.get_submodule(block.name) for block in blocks]
        self._length = length
        self._sums = {index: Tally(2) for index in self._indices[: len(blocks) - length + 1]}
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
        return [sums.total for sums in self._sums.values()]

    def state(self) -> dict[str, torch.Tensor]:
        """The sums, and inputs of runs that have begun."""
        inputs = {f"{position} {batch}": value for (position, batch), value in self._inputs.items()}
        return super().state() | inputs

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Observer.load_state`."""
        super().load_state(state)
        self._inputs.clear()
        for name in state:
            position, found, batch = name.partition(" ")
            if found:
                self._inputs[int(position), int(batch)] = state[name]

    def similarity(self) -> dict[int, float]:
        """First block of a run -> mean cosine."""
        return {index: _mean(sums) for index, sums in self._sums.items()}

    def _before(self, position: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._indices[position] in self._sums:
                # All batches are kept at once: off the accelerator.
                self._inputs[position, self._batch] = hidden_argument(args, kwargs).cpu()

        return hook

    def _after(self, position: int) -> Any:
        first = position - self._length + 1

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if first >= 0:
                after = first_tensor(output)
                before = self._inputs.pop((first, self._batch)).to(after.device)
                self._sums[self._indices[first]].add(similarity_sum(before, after, self._mask))

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
        # Tokens, router weights, probabilities, norms, weighted norms.
        self._sums = Tally(5, moe.num_experts)
        self._similarity = Tally(moe.num_experts + 1, moe.num_experts)
        # Not finite as soon as one output is not, whatever else is collected.
        self._output_total = Tally(1)
        self._counts = [0] * moe.num_experts
        self._weights: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        super().attach()
        return [self._router.register_forward_hook(self._after_router)] if self._router is not None else []

    def accumulators(self) -> list[torch.Tensor]:
        """Tensors to be summed over ranks, in an order that all ranks share."""
        return [sums.total for sums in (self._sums, self._similarity, self._output_total)]

    def block_done(self, block: int) -> None:
        """Move the sums to the CPU."""
        if block == self._block:
            self.accumulators()

    def profile(self) -> ExpertProfile:
        """The layer's statistics.

        :raises FloatingPointError: the experts' output is NaN or infinite
        """
        require_finite(float(self._output_total.total), "sum of expert outputs", self._block)
        tokens, gate, probability, norm, weighted = self._sums.total.tolist()
        similarity = self._similarity.total[:-1] / self._similarity.total[-1].clamp(min=1)
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
        """Keep router weights and norms until the layer is through."""
        self._counts[index] = len(weights)
        self._weights.append(weights)
        if self._outputs:
            self._norms.append(torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32))

    def after_layer(self, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Add everything up, keep what tells of NaN, and compare the experts on a sample."""
        self._output_total.add(output.sum(dtype=torch.float64))
        if self._weights:
            self._add_up()
        if self._redundancy:
            self._compare(tokens)

    def _add_up(self) -> None:
        weights = torch.cat(self._weights).float()
        columns = [torch.ones_like(weights), weights]
        if self._outputs:
            norms = torch.cat(self._norms)
            columns += [norms, weights * norms]
        sums = sums_by_expert(self._counts, torch.stack(columns, dim=1))
        self._sums.add(sums[:2], slice(0, 2))
        if self._outputs:
            self._sums.add(sums[2:], slice(3, 5))
        self._counts = [0] * len(self._counts)
        self._weights.clear()
        self._norms.clear()

    def _after_router(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        probability = None if self._limited else self._scores.probabilities(output)
        if probability is None:
            return
        keep = self.kept(len(probability))
        if keep is not None:
            probability = torch.where(keep.to(probability.device)[:, None], probability, 0.0)
        self._sums.add(probability.sum(dim=0, dtype=torch.float64), 2)

    def _compare(self, tokens: torch.Tensor) -> None:
        """Run all experts on an even sample of the tokens and add up the cosines of their outputs."""
        count = min(len(tokens), self._wave * _REDUNDANCY_TOKENS_PER_BATCH)
        chosen = torch.linspace(0, len(tokens) - 1, count, device=tokens.device).long()
        modules = expert_modules(self._experts)
        for sample in tokens[chosen].split(max(1, _REDUNDANCY_VALUES // (len(modules) * tokens.shape[-1]))):
            outputs = torch.stack([module(sample) for module in modules]).float()
            unit = torch.nn.functional.normalize(outputs, dim=-1)
            cosines = torch.einsum("eth,fth->ef", unit, unit)
            self._similarity.add(cosines, slice(0, -1))
        self._similarity.add(torch.full_like(cosines[0], count), -1)


def _mean(sums: Tally) -> float:
    total, count = sums.total.tolist()
    return total / count if count else float("nan")
