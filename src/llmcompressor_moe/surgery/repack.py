"""Put linearized experts back into the family's own fused module."""

from __future__ import annotations

import copy

import torch
from compressed_tensors.offload import align_modules, get_cache_init_kwargs, offload_module
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_linearized_moes
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmcompressor_moe.compat.llmcompressor.linear_experts import (
    config_of,
    fused_class,
    restore_checkpoint_names,
    was_fused,
)
from llmcompressor_moe.topology import (
    expert_count_attributes,
    expert_modules,
    expert_width_attributes,
    text_config,
)

__all__ = ["empty_fused", "fused_experts", "has_quantized_experts", "repack_experts"]


@torch.no_grad()
def repack_experts(model: PreTrainedModel) -> list[str]:
    """Replace every linearized experts module without quantized weights by the family's fused one, in place.

    A model that is not quantized is then what stock transformers builds: it runs on the fast fused kernels,
    and `save_pretrained` writes the checkpoint names of its family.

    :return: paths of the modules that were replaced
    """
    replaced = []
    loaded_linear = False
    for path, experts in get_linearized_moes(model):
        loaded_linear |= not was_fused(experts)
        fused_cls = fused_class(experts)
        if fused_cls is None or _is_quantized(experts):
            continue
        whole = fused_experts(experts, fused_cls, text_config(model.config))
        offload = get_cache_init_kwargs(experts)
        if offload:
            offload_module(whole, **offload)
        model.set_submodule(path, whole)
        replaced.append(path)
    if loaded_linear:
        restore_checkpoint_names(model, fused=bool(replaced))
    return replaced


def has_quantized_experts(model: PreTrainedModel) -> bool:
    """Whether any expert has a quantization scheme."""
    return any(_is_quantized(experts) for _, experts in get_linearized_moes(model))


def _is_quantized(experts: LinearExperts2D) -> bool:
    return any(hasattr(module, "quantization_scheme") for module in experts.modules())


def empty_fused(experts: LinearExperts2D, fused_cls: type[nn.Module], config: PreTrainedConfig) -> nn.Module:
    """The fused module that a family has in the place of linearized experts, on the meta device.

    :param fused_cls: its class
    :param config: of the text model
    """
    modules = expert_modules(experts)
    values = {name: len(modules) for name in expert_count_attributes(config)}
    if config.is_heterogeneous:
        # What the config says in general may be another layer's.
        values |= {name: modules[0].down_proj.in_features for name in expert_width_attributes(config)}
    with torch.device("meta"):
        empty = fused_cls(_with_values(config_of(experts, config), values))
    # Upstream's split reads these; the decorator of transformers sets them on most families, but not on all.
    for flag in ("is_transposed", "has_bias"):
        setattr(empty, flag, getattr(type(experts), flag))
    # A layer's own bound of activations, which no config of a layer says (Step-3.7).
    limit = getattr(experts, "limit", None)
    if limit is not None and hasattr(empty, "limit"):
        empty.limit = limit
    return empty


def fused_experts(
    experts: LinearExperts2D, fused_cls: type[nn.Module], config: PreTrainedConfig
) -> nn.Module:
    """A family's fused module with the values of linearized experts; all of them are in memory for that.

    :raises TypeError: their order in the fused module is not known
    """
    modules = expert_modules(experts)
    fused = empty_fused(experts, fused_cls, config)
    with align_modules(list(experts.modules())):
        for interleaved in (False, True):
            _assign(fused, _stack(modules, interleaved=interleaved), transposed=fused.is_transposed)
            if _splits_into(fused, modules[0]):
                break
        else:
            raise TypeError(
                f"{fused_cls.__name__} keeps gate and up projections in an order that this version of "
                f"llmcompressor-moe does "
                "not know; please report the model."
            )
    for name, buffer in fused.named_buffers():
        if buffer.device.type == "meta":
            raise TypeError(f"{fused_cls.__name__} has a buffer {name!r} that its experts cannot fill.")
    return fused.train(experts.training)


def _with_values(config: PreTrainedConfig, values: dict[str, int]) -> PreTrainedConfig:
    """A shallow copy of a config with other plain values; a copy of one layer's view, so without per-layer
    rules.
    """
    layer = copy.copy(config.per_layer_config[0] if config.is_heterogeneous else config)
    for name, value in values.items():
        setattr(layer, name, value)
    return layer


def _stack(modules: list[nn.Module], *, interleaved: bool) -> dict[str, torch.Tensor]:
    """Fused parameters [experts, out, in] (biases [experts, out]) in the untransposed layout."""
    tensors = {}
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        if getattr(modules[0].down_proj, kind, None) is None:
            continue
        tensors[f"down_proj{suffix}"] = torch.stack([getattr(module.down_proj, kind) for module in modules])
        up = torch.stack([getattr(module.up_proj, kind) for module in modules])
        if not hasattr(modules[0], "gate_proj"):
            tensors[f"up_proj{suffix}"] = up
            continue
        gate = torch.stack([getattr(module.gate_proj, kind) for module in modules])
        both = torch.stack([gate, up], dim=2).flatten(1, 2) if interleaved else torch.cat([gate, up], dim=1)
        tensors[f"gate_up_proj{suffix}"] = both
    return tensors


def _assign(fused: nn.Module, tensors: dict[str, torch.Tensor], *, transposed: bool) -> None:
    for name, tensor in tensors.items():
        value = tensor.transpose(1, 2).contiguous() if transposed and tensor.ndim == 3 else tensor
        if value.shape != getattr(fused, name).shape:
            raise TypeError(
                f"{type(fused).__name__}.{name} is {tuple(getattr(fused, name).shape)}, its experts give "
                f"{tuple(value.shape)}."
            )
        setattr(fused, name, nn.Parameter(value, requires_grad=getattr(fused, name).requires_grad))


def _splits_into(fused: nn.Module, expert: nn.Module) -> bool:
    """Whether upstream's own split of the fused module gives this, its first, expert back."""
    probe = _emptied(expert)
    probe.copy_from_experts_module(fused, 0)
    return all(
        torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        for ours, theirs in zip(probe.parameters(), expert.parameters(), strict=True)
    )


def _emptied(expert: nn.Module) -> nn.Module:
    """An expert of the same shape, all zeros. Weights on a disk cannot be copied along with their modules."""
    twin = copy.copy(expert)
    twin._modules = {
        name: nn.Linear(
            child.in_features,
            child.out_features,
            child.bias is not None,
            device=child.weight.device,
            dtype=child.weight.dtype,
        )
        if isinstance(child, nn.Linear)
        else child
        for name, child in expert._modules.items()
    }
    for parameter in twin.parameters():
        parameter.zero_()
    return twin
