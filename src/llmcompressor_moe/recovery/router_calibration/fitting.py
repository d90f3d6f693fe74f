"""A few steps that bring MoE layers, or the whole model, back to what they gave before compression."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import disable_offloading, get_execution_device
from compressed_tensors.utils import patch_attr
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llmcompressor_moe.profile.forward import forwards, sum_over_ranks
from llmcompressor_moe.profile.observing import RoutedObserver, first_tensor
from llmcompressor_moe.progress import progress
from llmcompressor_moe.recovery.fake_quantization import gradients_through_rounding
from llmcompressor_moe.recovery.router_calibration.outputs import OutputRecord, learning, output_loss
from llmcompressor_moe.recovery.router_calibration.recording import LayerRecord
from llmcompressor_moe.recovery.router_calibration.trainables import LayerParameters, descend
from llmcompressor_moe.topology import Block, Topology

__all__ = ["common_steps", "fit_layer", "fit_outputs", "layer_error"]


def fit_layer(
    model: PreTrainedModel,
    block: Block,
    parameters: LayerParameters,
    received: LayerRecord,
    wanted: torch.Tensor,
    steps: int,
    learning_rate: float,
) -> None:
    """Let one MoE layer give what is wanted from what it receives (least squares).

    :param received: what it receives now
    :param wanted: [tokens, hidden] what it gave for the same tokens before compression
    """
    moe = model.get_submodule(block.moe.module)
    chunks = zip(
        _spread(received.inputs, steps).split(-(-len(wanted) // steps)),
        _spread(wanted, steps).split(-(-len(wanted) // steps)),
        strict=True,
    )
    with _frozen(moe), _alone(model, block), parameters.active():
        for _, (inputs, targets) in zip(descend([parameters], steps, learning_rate), chunks, strict=False):
            with gradients_through_rounding(moe), torch.enable_grad():
                error = _squared_error(model, block, received.norm, inputs, targets)
                (error / _power(targets)).backward()


@torch.no_grad()
def layer_error(
    model: PreTrainedModel,
    block: Block,
    parameters: LayerParameters,
    received: LayerRecord,
    wanted: torch.Tensor,
) -> float:
    """E ||MoE(x) - wanted||^2 / E ||wanted||^2 over the tokens of all ranks: 0 is equal, 1 as good as zeros."""
    with _alone(model, block), parameters.active():
        error = float(_squared_error(model, block, received.norm, received.inputs, wanted))
    total, power = sum_over_ranks(torch.tensor([error, _power(wanted)], dtype=torch.float64)).tolist()
    return total / power if power else 0.0


def fit_outputs(
    model: PreTrainedModel,
    topology: Topology,
    parameters: Mapping[int, LayerParameters],
    record: OutputRecord,
    steps: int,
    learning_rate: float,
    gradient_checkpointing: bool,
) -> None:
    """Let the whole model say what it said before compression; each batch is seen once."""
    shares = torch.arange(len(record.batches)).tensor_split(steps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_frozen(model))
        stack.enter_context(learning(model, topology))
        if gradient_checkpointing:
            stack.enter_context(_checkpointed(model, topology))
        for layer in parameters.values():
            stack.enter_context(layer.active())
        turns = descend(list(parameters.values()), steps, learning_rate)
        advance = stack.enter_context(progress(len(shares), "Calibrating routers", passes=1))
        for _, indices in zip(turns, shares, strict=False):
            for index in indices.tolist():
                with torch.enable_grad():
                    (output_loss(model, record, index) / len(indices)).backward()
            advance(1)


def common_steps(wanted: int, available: int) -> int:
    """Steps that every rank has data for: at most ``wanted``, at least one."""
    if not is_distributed():
        return max(1, min(wanted, available))
    counts = torch.zeros(torch.distributed.get_world_size(), dtype=torch.float64)
    counts[torch.distributed.get_rank()] = available
    return max(1, min(wanted, int(sum_over_ranks(counts).min())))


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Gradients of weights that stay as they are would double the work."""
    with disable_offloading():
        before = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in before:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in before:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def _checkpointed(model: nn.Module, topology: Topology) -> Iterator[None]:
    """Keep what enters each block and compute the rest again in the backward pass: what a whole model leaves for
    it, rounded copies of its weights among them, would not fit beside a large one.
    """
    with contextlib.ExitStack() as stack:
        for block in topology.blocks:
            module = model.get_submodule(block.name)
            again = functools.partial(checkpoint, module.forward, use_reentrant=False)
            stack.enter_context(patch_attr(module, "forward", again))
        yield


def _spread(values: torch.Tensor, steps: int) -> torch.Tensor:
    """Rows in an order in which each of ``steps`` pieces holds tokens of all batches."""
    order = torch.cat([torch.arange(first, len(values), steps) for first in range(steps)])
    return values[order]


@contextlib.contextmanager
def _alone(model: PreTrainedModel, block: Block) -> Iterator[None]:
    """One MoE layer on its device, experts on routed tokens only, quantized as it will be served."""
    with RoutedObserver(model, block), forwards(model, quantized=True), disable_offloading():
        yield


def _squared_error(
    model: nn.Module, block: Block, norm: str | None, inputs: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum over tokens of ||MoE(x) - wanted||^2."""
    moe = model.get_submodule(block.moe.module)
    device = get_execution_device(
        next(m for m in moe.modules() if any(True for _ in m.parameters(recurse=False)))
    )
    hidden = inputs.to(device)
    if norm is not None:
        hidden = model.get_submodule(norm)(hidden)
    output = first_tensor(moe(hidden.unsqueeze(0))).reshape_as(targets)
    return (output.float() - targets.to(device).float()).square().sum()


def _power(targets: torch.Tensor) -> float:
    return float(targets.float().square().sum(dtype=torch.float64))
