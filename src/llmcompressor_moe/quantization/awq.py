"""What AWQ may smooth in an MoE model without changing what the router sees."""

from __future__ import annotations

import re

import torch
from compressed_tensors.offload import align_modules
from llmcompressor.modifiers.transform.awq.dynamic_mappings import (
    AWQ_DYNAMIC_MAPPING_REGISTRY,
    get_layer_mappings_from_model,
)
from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY, AWQMapping
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.quantization.trial import twin_of

__all__ = ["awq_mappings", "check_awq_fits"]


def awq_mappings(model: PreTrainedModel, *, attention: bool) -> list[AWQMapping]:
    """Upstream's mappings for a model, without those that cannot be meant.

    Upstream's mappings for unknown architectures scale the norm in front of the experts and leave the router
    as it is, which would change every routing decision: those keep only what lies behind the router.

    :param attention: whether attention is quantized too
    """
    known = {*AWQ_MAPPING_REGISTRY, *AWQ_DYNAMIC_MAPPING_REGISTRY}
    mappings = get_layer_mappings_from_model(model)
    if type(model).__name__ not in known:
        mappings = [mapping for mapping in mappings if not _norm_before_experts(mapping)]
    return [mapping for mapping in mappings if attention or _touches_experts(mapping)]


def _touches_experts(mapping: AWQMapping) -> bool:
    return any(re.search(r"(gate|up|down)_proj|w[123]\b", layer) for layer in mapping.balance_layers)


def _norm_before_experts(mapping: AWQMapping) -> bool:
    return "norm" in mapping.smooth_layer and _touches_experts(mapping)


def check_awq_fits(model_type: str, expert: nn.Module) -> None:
    """Refuse experts that AWQ's scaling would change.

    :raises ValueError: the expert does not compute the same when a row of up_proj is scaled and down_proj's
        column unscaled, as in gpt-oss, which clamps and shifts what up_proj gives
    """
    if not _scales_pass_through(expert):
        raise ValueError(
            f"algorithm='awq' would change what the experts of {model_type!r} compute: scaling up_proj and "
            "unscaling down_proj does not cancel out there. Use algorithm='gptq' or 'rtn'."
        )


@torch.no_grad()
def _scales_pass_through(expert: nn.Module) -> bool:
    probe = twin_of(expert, torch.device("cpu")).float()
    with align_modules(list(expert.modules())):
        for name, child in probe.named_children():
            if isinstance(child, nn.Linear):
                child.weight.copy_(getattr(expert, name).weight)
                if child.bias is not None:
                    child.bias.copy_(getattr(expert, name).bias)
    generator = torch.Generator().manual_seed(0)
    inputs = 4 * torch.randn(16, probe.up_proj.in_features, generator=generator)
    before = probe(inputs)
    probe.up_proj.weight[::2] *= 2
    if probe.up_proj.bias is not None:
        probe.up_proj.bias[::2] *= 2
    probe.down_proj.weight[:, ::2] /= 2
    return torch.allclose(probe(inputs), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
