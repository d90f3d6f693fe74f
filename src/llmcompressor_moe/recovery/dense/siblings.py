"""Which dense architecture computes what an MoE family computes outside of its experts, and its config."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmcompressor_moe.compat.transformers.building import class_for
from llmcompressor_moe.recovery.dense.parts import beside, mlp_prefix
from llmcompressor_moe.topology import Topology, find_topology

__all__ = ["NoSiblingError", "Sibling", "find_sibling", "sibling_of"]

# What belongs to a class or a file and not to the model that a config describes.
_NOT_CARRIED = {"model_type", "architectures", "transformers_version", "dtype", "auto_map", "_name_or_path"}


class NoSiblingError(ValueError):
    """No dense architecture computes what the family computes outside of its experts."""


@dataclass(frozen=True)
class _Entry:
    """What names cannot tell.

    :param model_type: the sibling
    :param all_dense: field of its config that is to hold the number of blocks, so that all of them are dense
    :param one_expert: fields of its config that are to be 1, so that every MoE layer is one expert with weight 1
    :param refused: reason why there is none
    """

    model_type: str = ""
    all_dense: str | None = None
    one_expert: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def own_class(self) -> bool:
        """Whether the sibling is the family itself, with other numbers in its config."""
        return self.all_dense is not None or bool(self.one_expert)


_PARTIAL_ROTARY = (
    "it rotates a part of each head, halves apart; GLM's dense families rotate neighbours and "
    "normalize otherwise"
)

# Elsewhere the name without "moe" is the sibling's. Each entry was tried on tiny models with random weights: the
# sibling's logits are the family's once the experts have been replaced.
_TABLE = {
    "mixtral": _Entry("mistral"),
    "flex_olmo": _Entry("olmo2"),
    "granitemoeshared": _Entry("granite"),
    "hunyuan_v1_moe": _Entry("hunyuan_v1_dense"),
    "dots1": _Entry("qwen3"),
    "solar_open": _Entry("llama"),
    "deepseek": _Entry("llama"),
    # Latent attention has no dense sibling that vLLM serves; these families know dense blocks themselves.
    "deepseek_v2": _Entry("deepseek_v2", all_dense="first_k_dense_replace"),
    "deepseek_v3": _Entry("deepseek_v3", all_dense="first_k_dense_replace"),
    # Norms of queries and keys over all heads, and norms before the sublayers: OLMo has none of the former, OLMo 2
    # and 3 have theirs behind the sublayers. The softmax of one router logit is 1.
    "olmoe": _Entry("olmoe", one_expert=("num_experts", "num_experts_per_tok")),
    "glm4_moe": _Entry(refused=_PARTIAL_ROTARY),
    "phimoe": _Entry(
        refused="its norms have biases, and dense families with those have no gated feed-forward"
    ),
    "gpt_oss": _Entry(
        refused="no dense family has attention sinks with biases everywhere, or its clamped gates"
    ),
}


@dataclass(frozen=True)
class Sibling:
    """A dense architecture for one model.

    :param config: complete, with ``architectures``, but for the dtype
    :param mlp: path of what takes the MoE layer's place, behind the block's: ``mlp.``
    :param matrices: path of the feed-forward's matrices in a checkpoint, behind the block's; ``mlp`` itself, or
        ``mlp.experts.0.``
    :param router: name of the weight of a router that has one choice, behind the block's path
    """

    config: PreTrainedConfig
    mlp: str
    matrices: str
    router: str | None = None

    @property
    def model_type(self) -> str:
        """Of the sibling."""
        return self.config.model_type


def sibling_of(config: PreTrainedConfig) -> str:
    """The sibling's ``model_type``, from a config alone.

    :param config: of the MoE model
    :raises NoSiblingError: there is none; says why
    """
    name = config.model_type
    if config.get_text_config() is not config:
        raise NoSiblingError(
            f"model_type={name!r} has other parts beside its decoder, which a dense text model would lose; give a "
            "text-only checkpoint."
        )
    return _entry(name).model_type


def _entry(name: str) -> _Entry:
    entry = _TABLE.get(name) or _Entry(re.sub(r"_?moe", "", name))
    refused = entry.refused
    if refused is None and (name == entry.model_type) != entry.own_class:
        refused = "its name tells no dense sibling"
    if refused is None and not _is_causal(entry.model_type):
        refused = f"the installed transformers has no dense {entry.model_type!r}"
    if refused is not None:
        raise NoSiblingError(
            f"model_type={name!r} has no dense sibling: {refused}. Trim its experts instead (`llmcompressor-moe "
            "compress`), and recover that."
        )
    return entry


def _is_causal(model_type: str) -> bool:
    if model_type not in CONFIG_MAPPING:
        return False
    return class_for(AutoModelForCausalLM, type(CONFIG_MAPPING[model_type]())) is not None


def find_sibling(model: PreTrainedModel, topology: Topology, width: int) -> Sibling:
    """The sibling's config at a width, having compared the names and shapes of all tensors.

    :param model: the MoE model, on the meta device or any other
    :param width: neurons of every feed-forward
    :raises NoSiblingError: there is none, or it has other tensors outside of the feed-forwards
    """
    config = model.config
    sibling_of(config)
    entry = _entry(config.model_type)
    dense = _config(config, entry, width)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(dense)
    dense.architectures = [type(built).__name__]
    if entry.one_expert:
        first = find_topology(built).blocks[0]
        path = len(f"{first.name}.")
        sibling = Sibling(
            dense,
            mlp=f"{first.moe.module[path:]}.",
            matrices=f"{first.moe.experts[path:]}.0.",
            router=f"{first.moe.router[path:]}.weight",
        )
    else:
        mlp = mlp_prefix(built.get_submodule(topology.stack)[0])
        sibling = Sibling(dense, mlp, matrices=mlp)
    _compare(model, topology, built, sibling.mlp)
    return sibling


def _config(config: PreTrainedConfig, entry: _Entry, width: int) -> PreTrainedConfig:
    cls = CONFIG_MAPPING[entry.model_type]
    values: dict[str, Any] = {
        name: copy.deepcopy(getattr(config, name))
        for name in cls().to_dict()
        if name not in _NOT_CARRIED and hasattr(config, name)
    }
    if "head_dim" in cls().to_dict() and values.get("head_dim") is None:
        # Where the MoE family derives it, its sibling may have a default.
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    if "layer_types" in cls().to_dict() and not hasattr(config, "layer_types"):
        # One kind of attention in all blocks; the sibling would let its window begin at some block.
        kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        values["layer_types"] = [kind] * config.num_hidden_layers
    values["intermediate_size"] = width
    if entry.all_dense:
        values[entry.all_dense] = config.num_hidden_layers
    values |= dict.fromkeys(entry.one_expert, 1)
    return cls(**values)


def _compare(model: PreTrainedModel, topology: Topology, built: PreTrainedModel, mlp: str) -> None:
    ours = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not feed_forward_tensor(model, topology, name, mlp)
    }
    theirs = {
        name: tensor.shape
        for name, tensor in built.state_dict().items()
        if not re.match(rf"{re.escape(topology.stack)}\.\d+\.{re.escape(mlp)}", name)
    }
    different = sorted(
        name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name) and "rotary" not in name
    )
    if different:
        name = different[0]
        raise NoSiblingError(
            f"model_type={topology.model_type!r} has no dense sibling: {built.config.model_type!r} differs in "
            f"{len(different)} tensors outside of the feed-forwards, {name} for one "
            f"({_shape(ours.get(name))} here, {_shape(theirs.get(name))} there). Trim its experts instead "
            "(`llmcompressor-moe compress`), and recover that."
        )


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))


def feed_forward_tensor(model: nn.Module, topology: Topology, name: str, mlp: str) -> bool:
    """Whether a tensor of the MoE model belongs to a feed-forward, which the sibling has otherwise."""
    for block in topology.blocks:
        if not name.startswith(f"{block.name}."):
            continue
        inside = [block.moe.module] if block.moe else [f"{block.name}.{mlp}".rstrip(".")]
        inside += beside(model, block)
        return any(name.startswith(f"{path}.") for path in inside)
    return False


def dense_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that a sibling's config names."""
    return getattr(transformers, config.architectures[0])
