"""Round weights and inputs of a model while it trains, with gradients that pass straight through the rounding.

compressed-tensors' own forward of a quantized module rounds by swapping the weight's data and without recording
gradients: those of rounded inputs would be lost, and with them the training of everything below.

Scales and zero points stay those of the checkpoint. The student then answers at its first step exactly as the
checkpoint does, whatever observer or algorithm chose them, and what is compressed at the end is what was trained.
A weight that leaves the range of its scale is clamped; finetuning moves weights by far less than a range.

The price: weights start on the grid, and one that moves by less than half a step changes nothing. Steps of eight
bits are fine enough for usual learning rates; those of four bits take rates of the order of a step over the number
of updates, or leave the learning to what is not rounded (routers, norms, embeddings).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.config_parts import QUANTIZATION, quantized_parts

__all__ = [
    "fake_quantize_in_training",
    "gradients_through_rounding",
    "has_quantized_modules",
    "quantization_parameters",
    "start_fake_quantization",
    "straight_through",
]


class _StraightThrough(torch.autograd.Function):
    """The rounded value forward, the gradient of the value as it was backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, through which gradients reach ``value`` unchanged (the straight-through estimator).

    Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation", 2013, section 4.

    :param value: any shape
    :param rounded: the same shape
    """
    return _StraightThrough.apply(value, rounded.to(value.dtype))


def has_quantized_modules(model: nn.Module) -> bool:
    """Whether any module has a quantization scheme."""
    return any(hasattr(module, "quantization_scheme") for module in model.modules())


def quantization_parameters(model: nn.Module) -> set[str]:
    """Paths of scales, zero points and what else a format keeps beside a weight."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
        for name, _ in module.named_parameters(recurse=False)
        if name not in ("weight", "bias")
    }


def start_fake_quantization(model: PreTrainedModel) -> None:
    """Turn a compressed model, in place, into one with floating-point weights that rounds as it runs.

    :param model: as transformers loads a compressed-tensors checkpoint
    """
    model.hf_quantizer.compressor.decompress_model(model)
    fake_quantize_in_training(model)
    # As a model that a recipe has just quantized: saving compresses it anew, and Trainer takes it for what it is.
    model.hf_quantizer = None
    model.is_quantized = False
    for part in quantized_parts(model.config):
        del part[QUANTIZATION]


def fake_quantize_in_training(model: nn.Module) -> None:
    """Have every quantized Linear and Embedding round by its scheme with straight-through gradients, in place.

    :param model: with floating-point weights
    """
    for module in model.modules():
        if not hasattr(module, "quantization_scheme") or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        module.quantization_status = QuantizationStatus.FROZEN
        module.forward = types.MethodType(_forward, module)
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                getattr(module, name).requires_grad_(True)


@contextlib.contextmanager
def gradients_through_rounding(model: nn.Module) -> Iterator[None]:
    """Let gradients reach what lies below modules that run quantized, for as long as the context is open."""
    changed = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding) and getattr(module, "quantization_enabled", False)
    ]
    before = {module: module.__dict__.get("forward") for module in changed}
    for module in changed:
        module.forward = types.MethodType(_forward, module)
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _forward(module: nn.Linear | nn.Embedding, values: torch.Tensor) -> torch.Tensor:
    scheme = module.quantization_scheme
    weight = module.weight
    if scheme.input_activations is not None:
        values = _rounded(module, values, "input", scheme.input_activations)
    if scheme.weights is not None:
        weight = _rounded(module, weight, "weight", scheme.weights)
    if isinstance(module, nn.Linear):
        output = functional.linear(values, weight, module.bias)
    else:
        output = functional.embedding(values, weight, module.padding_idx)
    if scheme.output_activations is not None:
        output = _rounded(module, output, "output", scheme.output_activations)
    return output


def _rounded(module: nn.Module, value: torch.Tensor, kind: str, args: Any) -> torch.Tensor:
    with torch.no_grad():
        rounded = forward_quantize(module, value.detach(), kind, args)
    return straight_through(value, rounded)
