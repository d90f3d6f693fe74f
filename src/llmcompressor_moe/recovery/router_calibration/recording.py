"""What MoE layers receive and give, token by token, on a choice of tokens that two passes have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from llmcompressor_moe.profile.computing import stored_dtype
from llmcompressor_moe.profile.observing import (
    Observer,
    first_tensor,
    hidden_argument,
    observe_batches,
)
from llmcompressor_moe.topology import Block, Topology

__all__ = ["LayerRecord", "LayerRecorder", "layer_recorders", "record_layers"]


@dataclass
class LayerRecord:
    """One MoE layer on the tokens that were chosen, on the CPU, in the model's dtype.

    :param inputs: [tokens, hidden] what entered its FFN norm; what entered the layer itself where ``norm`` is None
    :param outputs: [tokens, hidden] what the layer gave, shared experts included
    :param norm: module path of the norm whose output the layer receives unchanged; None where there is none
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    norm: str | None


class LayerRecorder(Observer):
    """Keeps up to ``per_batch`` tokens of each batch, at equal distances among those that are no padding."""

    def __init__(self, model: nn.Module, block: Block, per_batch: int) -> None:
        super().__init__()
        self._moe = model.get_submodule(block.moe.module)
        parent = model.get_submodule(block.name)
        self._norms = {
            f"{block.name}.{name}": child for name, child in parent.named_children() if "norm" in name
        }
        self._per_batch = per_batch
        self._block = block.index
        self._dtype = stored_dtype(model)
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []
        # Batch -> the last norm, what entered it and what it gave.
        self._last: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}
        self._norm: str | None = None

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        return [
            *(norm.register_forward_hook(self._after_norm(name)) for name, norm in self._norms.items()),
            self._moe.register_forward_hook(self._after_moe, with_kwargs=True),
        ]

    def block_done(self, block: int) -> None:
        """Move what is kept to the CPU."""
        if block == self._block:
            self._inputs, self._outputs = (
                [value.cpu() for value in values] for values in (self._inputs, self._outputs)
            )

    def record(self) -> LayerRecord:
        """Everything that was kept."""
        return LayerRecord(torch.cat(self._inputs), torch.cat(self._outputs), self._norm)

    def _after_norm(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._last[self._batch] = (name, first_tensor(args), output)

        return hook

    def _after_moe(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        received, self._norm = hidden_argument(args, kwargs), None
        last = self._last.pop(self._batch, None)
        if last is not None and last[2].data_ptr() == received.data_ptr():
            self._norm, received, _ = last
        self._inputs.append(self._choose(received))
        self._outputs.append(self._choose(first_tensor(output)))

    def _choose(self, values: torch.Tensor) -> torch.Tensor:
        flat = values.reshape(-1, values.shape[-1])
        if self._mask is not None and self._mask.numel() == len(flat):
            flat = flat[self._mask.reshape(-1).to(flat.device)]
        count = min(len(flat), self._per_batch)
        # A copy, because a choice of rows would keep the whole batch alive where it is a view.
        chosen = flat[torch.linspace(0, len(flat) - 1, count, device=flat.device).round().long()]
        return chosen.to(self._dtype)


def layer_recorders(
    model: PreTrainedModel, topology: Topology, layers: Sequence[int], batches: int, tokens: int
) -> dict[int, LayerRecorder]:
    """What keeps some tokens of each batch while a model runs.

    The same batches and number of tokens give the same tokens, whatever was cut from the model in between.

    :param layers: block indices
    :param batches: how many the model will run on
    :param tokens: to keep, about
    """
    per_batch = max(1, tokens // max(batches, 1))
    wanted = set(layers)
    return {
        block.index: LayerRecorder(model, block, per_batch)
        for block in topology.blocks
        if block.index in wanted
    }


def record_layers(
    model: PreTrainedModel,
    topology: Topology,
    layers: Sequence[int],
    batches: Sequence[dict[str, Any]],
    tokens: int,
    *,
    quantized: bool = False,
) -> dict[int, LayerRecord]:
    """Run ``model``, offloaded or not, once over ``batches`` and keep what its MoE layers received and gave; see
    `layer_recorders`.

    :param quantized: run quantized modules as they will be served
    :return: block index -> record of this rank's batches
    """
    recorders = layer_recorders(model, topology, layers, len(batches), tokens)
    observe_batches(model, recorders.values(), batches, "Recording MoE layers", quantized=quantized)
    return {index: recorder.record() for index, recorder in recorders.items()}
