"""Try a scheme on one expert, exactly as upstream would apply it, without touching the expert."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from compressed_tensors.quantization import (
    QuantizationStatus,
    disable_quantization,
    enable_quantization,
    forward_quantize,
)
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe, update_qparams
from llmcompressor.observers import fuse_weight_observers
from torch import nn

from llmcompressor_moe.profile.computing import computed_in
from llmcompressor_moe.quantization.schemes import Candidate, needs_static_inputs

__all__ = ["Trial", "twin_of"]

_INPUTS = ("input",)


def twin_of(expert: nn.Module, device: torch.device) -> nn.Module:
    """An expert of the same kind with Linears of its own, their weights not yet filled."""
    twin = copy.copy(expert)
    # Offloading binds a forward to the expert itself; the twin runs its class's.
    twin.__dict__ = {name: value for name, value in expert.__dict__.items() if name != "forward"}
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    twin._modules = {}
    for name, child in expert.named_children():
        if isinstance(child, nn.Linear):
            child = nn.Linear(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                device=device,
                dtype=child.weight.dtype,
            ).requires_grad_(False)
        twin._modules[name] = child
    return twin


class Trial:
    """One scheme, tried on one expert of a kind after the other.

    Scales come from upstream's observers, rounding from compressed-tensors: what is measured is what
    `QuantizationModifier` would do.
    """

    def __init__(self, expert: nn.Module, candidate: Candidate, device: torch.device) -> None:
        self._twin = twin_of(expert, device)
        self._linears = {
            name: child for name, child in self._twin.named_children() if isinstance(child, nn.Linear)
        }
        self._static_inputs = needs_static_inputs(candidate.scheme)
        self._has_inputs = candidate.scheme.input_activations is not None
        for linear in self._linears.values():
            initialize_module_for_quantization(linear, candidate.for_targets(["Linear"]))
            initialize_observer(linear, "weight")
            linear.quantization_status = QuantizationStatus.CALIBRATION
        fuse_weight_observers(self._twin)

    @torch.no_grad()
    def run(self, expert: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Quantize an expert's weights and run it.

        :param expert: its weights on the trial's device
        :param inputs: [n, hidden] on the trial's device, in the dtype to compute in (weights are rounded in the
            dtype that they are stored in)
        :return: outputs [n, hidden]; squared Frobenius norm of what rounding changed in all weights
        """
        changed = 0.0
        for name, linear in self._linears.items():
            source = getattr(expert, name)
            linear.weight.copy_(source.weight)
            if source.bias is not None:
                linear.bias.copy_(source.bias)
        linears = list(self._linears.values())
        observe(linears, "weight")
        update_qparams(linears, "weight")
        if self._static_inputs and len(inputs):
            self._calibrate_inputs(inputs)
        for linear in linears:
            rounded = forward_quantize(linear, linear.weight, "weight", linear.quantization_scheme.weights)
            changed += float((rounded.float() - linear.weight.float()).square().sum(dtype=torch.float64))
            linear.weight.copy_(rounded)
            # Rounded weights are in place; only inputs are left to do on the way.
            (enable_quantization if self._has_inputs else disable_quantization)(linear)
        if not len(inputs):
            return inputs, changed
        with computed_in(self._twin.modules(), inputs.dtype):
            return self._twin(inputs), changed

    def _calibrate_inputs(self, inputs: torch.Tensor) -> None:
        handles = []
        for linear in self._linears.values():
            initialize_observer(linear, "input")
            disable_quantization(linear)
            handles.append(
                linear.register_forward_pre_hook(lambda module, args: module.input_observer(args[0]) and None)
            )
        with computed_in(self._twin.modules(), inputs.dtype):
            self._twin(inputs)
        for handle in handles:
            handle.remove()
        update_qparams(list(self._linears.values()), _INPUTS)
