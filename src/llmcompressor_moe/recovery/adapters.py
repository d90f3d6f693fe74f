"""See a student through the adapters that peft puts around its modules."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.topology import Block, NotAnMoEError, Topology, find_topology, text_config

__all__ = [
    "adapter_parameters",
    "forget_topology",
    "inner_model",
    "plain_name",
    "remember_topology",
    "student_topology",
]

# What peft puts in front of the paths of a model that it wraps, and between a wrapper and what it wraps.
_WRAPPER = re.compile(r"^base_model\.model\.")
_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")
_TOPOLOGY = "_topology_before_adapters"


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model under the wrappers of peft, accelerate and torch; itself where there are none."""
    while hasattr(model, "module") and not isinstance(model, PreTrainedModel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_name(path: str) -> str:
    """The path that a parameter or module had before it was wrapped."""
    return _WRAPPED.sub("", _WRAPPER.sub("", path))


def adapter_parameters(model: nn.Module) -> set[str]:
    """Paths of the parameters that adapters added."""
    found: set[str] = set()
    for path, module in model.named_modules():
        # peft is an optional dependency; every wrapper of its says where its own parameters are.
        for name in getattr(module, "adapter_layer_names", ()):
            found |= {f"{path}.{name}.{inside}" for inside, _ in getattr(module, name).named_parameters()}
    return found


def remember_topology(model: PreTrainedModel) -> None:
    """Keep where everything stands, before adapters are put around experts and routers: a module's path then
    leads to its wrapper.
    """
    setattr(model, _TOPOLOGY, student_topology(model))


def forget_topology(model: PreTrainedModel) -> None:
    """Look for everything anew from now on: the adapters are gone."""
    model.__dict__.pop(_TOPOLOGY, None)


def student_topology(model: PreTrainedModel) -> Topology:
    """Blocks of a student and, in each, its MoE layer; a dense student's blocks have none.

    :param model: a transformers model, with adapters or not
    :raises ValueError: it has no stack of blocks
    """
    remembered = getattr(model, _TOPOLOGY, None)
    if remembered is not None:
        return remembered
    try:
        return find_topology(model)
    except NotAnMoEError:
        return _dense_topology(model)


def _dense_topology(model: PreTrainedModel) -> Topology:
    config = text_config(model.config)
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no stack of {config.num_hidden_layers} blocks.")
    path, stack = max(stacks, key=lambda found: sum(value.numel() for value in found[1].parameters()))
    blocks = tuple(Block(index, f"{path}.{index}", None) for index in range(len(stack)))
    return Topology(model_type=config.model_type, stack=path, blocks=blocks)
