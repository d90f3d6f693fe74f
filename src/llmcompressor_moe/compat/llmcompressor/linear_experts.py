"""llm-compressor's linearized experts where they stop short of a model that it supports otherwise."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe import helpers, linear_experts
from llmcompressor.modeling.moe.gpt_oss import GptOssExpertMLP
from llmcompressor.modeling.moe.linear_experts import (
    ExpertMLP,
    ExpertMLPWithGate,
    ExpertMLPWithoutGate,
    LinearExperts2D,
)
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from llmcompressor_moe.compat.transformers.conversions import own_conversions, save_by

__all__ = [
    "between_layers",
    "config_of",
    "fused_class",
    "linearize_without_weights",
    "register_linearizations",
    "restore_checkpoint_names",
    "was_fused",
]


class _Llama4TextLinearExperts(Llama4LinearExperts):
    """Also for a text-only Llama 4, and for a layer whose expert count differs from the config's."""

    @classmethod
    def from_experts_module(cls, experts: nn.Module, config: PreTrainedConfig) -> LinearExperts2D:
        text = copy.copy(getattr(config, "text_config", config))
        text.per_layer_config = None
        text.num_local_experts = experts.num_experts
        linear = super().from_experts_module(experts, SimpleNamespace(text_config=text))
        linear._source_experts_cls = type(experts)
        return linear


class _Step3p7LinearExperts(LinearExperts2D):
    """Experts that follow the interface without its decorator, and clamp activations by a limit of their layer."""

    is_concatenated = True
    is_transposed = False
    has_bias = False
    has_gate = True
    _apply_gate = Step3p7Experts._apply_gate

    @classmethod
    def from_experts_module(cls, experts: nn.Module, config: PreTrainedConfig) -> LinearExperts2D:
        for flag in ("is_concatenated", "is_transposed", "has_bias", "has_gate"):
            setattr(experts, flag, getattr(cls, flag))
        linear = super().from_experts_module(experts, getattr(config, "text_config", config))
        linear.limit = experts.limit
        return linear


def register_linearizations() -> None:
    """Make `oneshot` linearize Llama 4 and Step-3.7 by the classes of this module, and all experts in their dtype.

    llm-compressor's own class for Llama 4 reads ``config.text_config``, which a text-only model has not, takes the
    expert count of the whole model, and does not say what class the experts had. All of its classes make experts
    in the dtype that the config names, which a model that was cast after loading has not.

    Experts get the settings of their activation, which llm-compressor leaves behind unless they have the names
    that gpt-oss gives them.

    llm-compressor reads and parses the source of a class of experts to find the arguments of its decorator, each
    time that it looks whether a module holds experts: 20 ms per layer. They are read once per class.
    """
    if not hasattr(helpers.get_use_experts_implementation_args, "__wrapped__"):
        once = _once_per_class(helpers.get_use_experts_implementation_args)
        helpers.get_use_experts_implementation_args = once
        linear_experts.get_use_experts_implementation_args = once
    from_experts = LinearExperts2D.from_experts_module.__func__
    if not hasattr(from_experts, "_keeps_settings"):
        LinearExperts2D.from_experts_module = classmethod(_with_settings(from_experts))
    LinearExperts2D._registry[Llama4TextExperts] = _Llama4TextLinearExperts
    LinearExperts2D._registry[Step3p7Experts] = _Step3p7LinearExperts
    for kind in (ExpertMLPWithGate, ExpertMLPWithoutGate, GptOssExpertMLP):
        if not hasattr(kind.copy_from_experts_module, "__wrapped__"):
            kind.copy_from_experts_module = _in_its_dtype(kind.copy_from_experts_module)


def _once_per_class(
    read: Callable[[type], dict[str, bool] | None],
) -> Callable[[type], dict[str, bool] | None]:
    found = functools.cache(read)

    @functools.wraps(read)
    def read_once(experts_cls: type) -> dict[str, bool] | None:
        arguments = found(experts_cls)
        return None if arguments is None else dict(arguments)

    return read_once


def _in_its_dtype(copy_from: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(copy_from)
    def copied(expert: ExpertMLP, experts: nn.Module, index: int) -> None:
        # Opening splits descriptions of stored tensors by the same functions: a module without parameters.
        parameter = next(experts.parameters(), None)
        if parameter is not None:
            expert.to(dtype=parameter.dtype)
        copy_from(expert, experts, index)

    return copied


def config_of(experts: nn.Module, config: PreTrainedConfig) -> PreTrainedConfig:
    """A config that gives one width of experts, where the model's lists one for text and one for images.

    :param experts: fused or linearized
    """
    if not isinstance(getattr(config, "moe_intermediate_size", None), list):
        return config
    own = copy.copy(config)
    fused = getattr(experts, "intermediate_dim", None)
    # The class checks what is assigned to it.
    own.__dict__["moe_intermediate_size"] = fused or experts.intermediate_size
    return own


def _with_settings(from_experts: Callable[..., LinearExperts2D]) -> Callable[..., LinearExperts2D]:
    @functools.wraps(from_experts)
    def converted(
        cls: type[LinearExperts2D], experts: nn.Module, config: PreTrainedConfig
    ) -> LinearExperts2D:
        linear = from_experts(cls, experts, config_of(experts, config))
        for name, value in vars(experts).items():
            if isinstance(value, int | float | str) and not hasattr(linear, name):
                setattr(linear, name, value)
        return linear

    converted._keeps_settings = True
    return converted


def was_fused(experts: LinearExperts2D) -> bool:
    """Whether experts were linearized from a fused module that was loaded, and not loaded as Linears.

    llm-compressor notes the class of the former only.
    """
    return hasattr(experts, "_source_experts_cls")


def fused_class(experts: LinearExperts2D) -> type[nn.Module] | None:
    """The class that experts were linearized from, or were loaded in place of; None if unknown.

    llm-compressor's ``to_experts_module`` puts experts back only where it linearized them itself, at the count
    that they had then. For the others its registry is read backwards.
    """
    source = getattr(experts, "_source_experts_cls", None)
    if source is not None:
        return source
    return {linear: fused for fused, linear in LinearExperts2D._registry.items()}.get(type(experts))


def between_layers(expert: ExpertMLP, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What an expert does between its first layers and its last.

    It stands in no module of its own that could be called.

    :param gate: outputs of the gate projection, [tokens, width]; ignored by experts without one
    :param up: outputs of the up projection, [tokens, width]
    """
    if hasattr(expert, "gate_proj"):
        return expert._apply_gate(torch.cat([gate, up], dim=-1))
    return expert.act_fn(up)


def linearize_without_weights(experts: nn.Module, config: PreTrainedConfig) -> LinearExperts2D:
    """Linearized experts on the meta device.

    llm-compressor offloads them as the fused ones were, which it cannot for the meta device; before weights are
    loaded there is nothing to offload.

    :param experts: fused, on the meta device
    :param config: of their layer, which counts them
    """
    linear_cls = LinearExperts2D.get_linear_experts_cls(type(experts))
    with contextlib.ExitStack() as patches:
        for module in {sys.modules[cls.__module__] for cls in linear_cls.__mro__}:
            if hasattr(module, "offload_module"):
                patches.enter_context(patch_attr(module, "offload_module", lambda module, **_: None))
        return linear_cls.from_experts_module(experts, config)


def restore_checkpoint_names(model: PreTrainedModel, *, fused: bool) -> None:
    """Undo what `load_quantizable_moe` leaves behind: transformers' table of checkpoint names changed for a
    whole family.

    Every other model of the family that this process loads or saves would miss its experts.

    :param fused: whether the model's experts are fused again, so that it has to save by the restored names,
        too
    """
    model_type = model.config.model_type
    original = own_conversions(model_type)
    if original is not None:
        register_checkpoint_conversion_mapping(model_type, original, overwrite=True)
    if fused:
        save_by(model, get_model_conversion_mapping(model))
