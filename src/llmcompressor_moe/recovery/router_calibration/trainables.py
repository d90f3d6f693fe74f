"""The few parameters that router calibration moves: routers, FFN norms, one factor per expert."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import (
    align_modules,
    disable_offloading,
    get_execution_device,
    update_offload_parameter,
)
from torch import nn
from torch.utils.hooks import RemovableHandle

from llmcompressor_moe.profile.forward import sum_over_ranks
from llmcompressor_moe.topology import MoELayer, expert_modules

__all__ = ["PARTS", "LayerParameters", "can_scale", "descend", "trainable_layer"]

PARTS = ("router", "norms", "scales")


@dataclass
class LayerParameters:
    """What may move in one MoE layer, with fp32 copies that the optimizer works on.

    :param owners: (module, parameter name) of routers and norms
    :param masters: their values in fp32, in the same order
    :param experts: the layer's experts, where their factors may move
    :param factors: [experts] fp32, one factor on each expert's output; 1 at the start
    """

    owners: list[tuple[nn.Module, str]]
    masters: list[torch.Tensor]
    experts: list[nn.Module]
    factors: torch.Tensor | None
    _before: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = [value.clone() for value in self.all]

    @property
    def all(self) -> list[torch.Tensor]:
        """Every fp32 tensor that moves."""
        return [*self.masters, *([] if self.factors is None else [self.factors])]

    @property
    def kept_factors(self) -> list[float]:
        """The factors as numbers; empty where there are none."""
        return [] if self.factors is None else self.factors.tolist()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Parameters are on the device and take gradients; experts' outputs are multiplied by their factors."""
        handles: list[RemovableHandle] = []
        if self.factors is not None:
            handles = [
                expert.register_forward_hook(_times(self.factors, index))
                for index, expert in enumerate(self.experts)
            ]
        # Offloaded weights must stay the same tensors for as long as gradients flow to them.
        with disable_offloading():
            for module, name in self.owners:
                getattr(module, name).requires_grad_(True)
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
                for module, name in self.owners:
                    parameter = getattr(module, name)
                    parameter.requires_grad_(False)
                    parameter.grad = None

    def take_gradients(self) -> None:
        """Move gradients from the model to the fp32 copies."""
        for (module, name), master in zip(self.owners, self.masters, strict=True):
            parameter = getattr(module, name)
            # A parameter that only selects (a correction bias) has none.
            master.grad = None if parameter.grad is None else parameter.grad.float().to(master.device)
            parameter.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Put the fp32 values into the model (factors act through hooks until they are folded)."""
        for (module, name), master in zip(self.owners, self.masters, strict=True):
            parameter = getattr(module, name)
            parameter.data.copy_(master)

    @torch.no_grad()
    def store(self) -> None:
        """Write into the model for good, where its weights really live."""
        for (module, name), master in zip(self.owners, self.masters, strict=True):
            with align_modules([module]):
                dtype = getattr(module, name).dtype
            update_offload_parameter(module, name, master.to(dtype))

    @torch.no_grad()
    def restore(self) -> None:
        """Undo everything."""
        for value, before in zip(self.all, self._before, strict=True):
            value.copy_(before)
        self.store()

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply each expert's last Linear by its factor: what the hooks did is then in the weights."""
        if self.factors is None:
            return
        scaled = []
        for expert, factor in zip(self.experts, self.factors.tolist(), strict=True):
            down = expert.down_proj
            with align_modules([down]):
                scaled += [
                    (down, name, getattr(down, name) * factor)
                    for name in ("weight", "bias", "weight_scale")
                    if getattr(down, name, None) is not None
                ]
        # Ranks may share their weights: all have read them before anyone writes.
        if is_distributed():
            torch.distributed.barrier()
        for module, name, value in scaled:
            update_offload_parameter(module, name, value)


def can_scale(experts: Iterable[nn.Module]) -> bool:
    """Whether a factor can go into the experts' weights without another rounding: they are in 16 or 32 bit, or
    their scales are.
    """
    for expert in experts:
        scale = getattr(expert.down_proj, "weight_scale", None)
        two_levels = getattr(expert.down_proj, "weight_global_scale", None) is not None
        if two_levels or (scale is not None and scale.dtype not in _WIDE):
            return False
    return True


_WIDE = (torch.float16, torch.bfloat16, torch.float32)


def trainable_layer(
    model: nn.Module, moe: MoELayer, norm: str | None, parts: Sequence[str]
) -> LayerParameters:
    """Collect what may move in one MoE layer.

    :param norm: module path of its FFN norm, if it has one
    :param parts: some of `PARTS`
    """
    names: list[str] = []
    if "router" in parts and moe.router:
        names.append(moe.router)
    if "norms" in parts and norm:
        names.append(norm)
    owners, masters = [], []
    for module in (module for name in names for module in model.get_submodule(name).modules()):
        with align_modules([module]):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_floating_point():
                    owners.append((module, name))
                    masters.append(parameter.detach().to(torch.float32, copy=True))
    experts = expert_modules(model.get_submodule(moe.experts))
    factors = None
    if "scales" in parts and can_scale(experts):
        device = get_execution_device(experts[0].down_proj)
        factors = torch.ones(len(experts), device=device, requires_grad=True)
    return LayerParameters(owners, masters, experts, factors)


def descend(layers: Sequence[LayerParameters], steps: int, learning_rate: float) -> Iterator[None]:
    """Adam over ``steps`` steps with a rate that falls linearly to zero. Each turn of the loop must leave
    gradients in the model; ranks add theirs.

    The rate of a tensor is ``learning_rate`` times its root mean square, so that one number fits routers and norms
    of any model.
    """
    tensors = [value for layer in layers for value in layer.all]
    rates = [
        learning_rate * float(value.detach().square().mean().sqrt().clamp_min(1e-8)) for value in tensors
    ]
    groups = [{"params": [value], "lr": rate} for value, rate in zip(tensors, rates, strict=True)]
    optimizer = torch.optim.Adam(groups)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        yield
        for layer in layers:
            layer.take_gradients()
        for value in tensors:
            # A rank whose tokens missed an expert has no gradient where others have one.
            value.grad = sum_over_ranks(torch.zeros_like(value) if value.grad is None else value.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer in layers:
            layer.write()


def _times(factors: torch.Tensor, index: int) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output * factors[index].to(output.dtype)

    return hook
