"""Find blocks, MoE layers, routers, experts and shared experts in any transformers model, by structure.

The anchor is the experts interface of transformers 5 (``@use_experts_implementation``) or, inside
``oneshot``, the linearized experts that llm-compressor puts in its place. Everything else follows from where
those modules stand.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from compressed_tensors.offload import disable_onloading
from llmcompressor.modeling.moe.linear_experts import ExpertMLP, LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_linearized_moes, get_non_linearized_moes
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmcompressor_moe.families import exception_for

__all__ = [
    "Block",
    "MoELayer",
    "NotAnMoEError",
    "Topology",
    "check_family",
    "expert_count_attributes",
    "expert_modules",
    "expert_width_attributes",
    "find_topology",
    "find_towers",
    "text_config",
]

_EXPERT_COUNT = re.compile(r"^(moe_)?(n|num)_(local_|routed_)*experts$")
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token", "top_k", "moe_k")
_EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size")
_ROUTER_NAMES = ("gate", "router")
_GROUPS = ("n_group", "num_expert_group")
_GROUPS_KEPT = ("topk_group", "top_k_group", "num_limited_groups")


class NotAnMoEError(ValueError):
    """The model has no MoE layer that this package can see."""


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer, as module paths from the model's root.

    :param module: the whole MoE layer (router, experts, shared experts); the block itself where the family
        keeps router and experts directly in the block, see ``inline``
    :param experts: the module that holds the routed experts
    :param router: the module that scores the experts
    :param shared_experts: modules inside the MoE layer that every token passes
    :param num_experts: routed experts in this layer
    :param top_k: experts that a token is routed to
    :param num_groups: groups that the router limits its choice to (1: not group-limited)
    :param groups_kept: groups that a token may be routed into
    """

    module: str
    experts: str
    router: str | None
    shared_experts: tuple[str, ...]
    num_experts: int
    top_k: int
    num_groups: int = 1
    groups_kept: int = 1
    inline: bool = False

    @property
    def min_experts(self) -> int:
        """Fewest experts with which the router can still choose ``top_k`` of them."""
        if self.num_groups == 1:
            return self.top_k
        # Group-limited routers rank groups by their two best experts.
        per_group = max(2, -(-self.top_k // self.groups_kept))
        return per_group * self.num_groups


@dataclass(frozen=True)
class Block:
    """One transformer block: its index in the stack, its module path and its MoE layer, if it has one."""

    index: int
    name: str
    moe: MoELayer | None


@dataclass(frozen=True)
class Topology:
    """Where everything is.

    :param model_type: the text config's ``model_type``
    :param stack: module path of the ``ModuleList`` that holds the blocks
    :param blocks: all blocks, in order
    """

    model_type: str
    stack: str
    blocks: tuple[Block, ...]

    @property
    def moe_layers(self) -> dict[int, MoELayer]:
        """Block index -> MoE layer, for the blocks that have one."""
        return {block.index: block.moe for block in self.blocks if block.moe is not None}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that describes the decoder's blocks (the config itself for text-only models)."""
    return config.get_text_config(decoder=True)


def expert_count_attributes(config: PreTrainedConfig) -> list[str]:
    """Canonical names (after ``attribute_map``) of the text config's attributes that count routed experts."""
    config = text_config(config)
    names = {config.attribute_map.get(name, name) for name in [*config.__dict__, *config.attribute_map]}
    return sorted(name for name in names if _EXPERT_COUNT.match(name) and name in config.__dict__)


def expert_width_attributes(config: PreTrainedConfig) -> list[str]:
    """Canonical names of the text config's attributes that may say how wide routed experts are; one, or none.

    Some families list a width for text and one for images, which is not looked at.
    """
    config = text_config(config)
    return [name for name in _EXPERT_WIDTHS if isinstance(config.__dict__.get(name), int)][:1]


def expert_modules(experts: nn.Module) -> list[nn.Module]:
    """The routed experts of a linearized experts module, in order (its activation function left out)."""
    return [child for child in experts.children() if isinstance(child, ExpertMLP)]


def check_family(config: PreTrainedConfig) -> None:
    """Refuse families of which nothing can be trimmed.

    :raises NotAnMoEError: the table of exceptions has a reason
    """
    # A model can be refused whose text model works by itself.
    for model_type in dict.fromkeys((config.model_type, text_config(config).model_type)):
        reason = exception_for(model_type).refuse
        if reason is not None:
            raise NotAnMoEError(f"Models of model_type {model_type!r} cannot be trimmed: {reason}.")


def find_topology(model: PreTrainedModel) -> Topology:
    """Find the blocks of a model and, in each, the MoE layer.

    :param model: any transformers model, on any device (meta as well), linearized or not
    :raises NotAnMoEError: no part of the family can be trimmed, no module of the model follows the experts
        interface, or MoE layers stand in more than one stack of blocks
    """
    config = text_config(model.config)
    check_family(model.config)
    by_stack: dict[str, dict[int, list[str]]] = {}
    for path, _ in [*get_non_linearized_moes(model), *get_linearized_moes(model)]:
        place = _place_in_stack(model, path)
        if place is not None:
            stack, index = place
            by_stack.setdefault(stack, {}).setdefault(index, []).append(path)
    if not by_stack:
        raise NotAnMoEError(
            f"{type(model).__name__} (model_type {config.model_type!r}) has no MoE layer: none of its "
            f"modules follows the "
            "experts interface of transformers 5. These modifiers trim Mixture-of-Experts models only; for a "
            "dense model use llm-compressor's own modifiers, and for a custom MoE wrap its experts with "
            "`use_experts_implementation`."
        )
    if len(by_stack) > 1:
        raise NotAnMoEError(
            f"{type(model).__name__} has MoE layers in several stacks of blocks "
            f"({', '.join(sorted(by_stack))}); "
            "pass the sub-model that is to be trimmed."
        )
    ((stack, experts_of),) = by_stack.items()
    blocks = tuple(
        Block(
            int(index),
            f"{stack}.{index}",
            _moe_layer(model, config, f"{stack}.{index}", experts_of.get(int(index), [])),
        )
        for index, _ in model.get_submodule(stack).named_children()
    )
    return Topology(model_type=config.model_type, stack=stack, blocks=blocks)


def find_towers(model: PreTrainedModel, topology: Topology) -> list[str]:
    """Paths of what stands beside the text model: vision and audio towers, and their projectors.

    :param topology: of the same model
    """
    above = topology.stack.split(".")[:-1]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        ".".join([*above[:depth], name])
        for depth, own in enumerate(above)
        for name, child in model.get_submodule(".".join(above[:depth])).named_children()
        if name != own and all(child is not end for end in ends) and any(True for _ in child.parameters())
    ]


def _place_in_stack(model: nn.Module, path: str) -> tuple[str, int] | None:
    """The outermost ModuleList above ``path`` and the index in it."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        if parts[depth].isdigit() and isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[:depth]), int(parts[depth])
    return None


def _moe_layer(
    model: nn.Module, config: PreTrainedConfig, block: str, experts_paths: Sequence[str]
) -> MoELayer | None:
    if not experts_paths:
        return None
    # Where tokens of text and of images have experts of their own, those for text come first.
    experts_path = experts_paths[0]
    holder_path, _, experts_name = experts_path.rpartition(".")
    module_path = holder_path if len(experts_paths) == 1 else _common_parent(experts_paths)
    module, holder = model.get_submodule(module_path), model.get_submodule(holder_path)
    experts = model.get_submodule(experts_path)
    num_experts = _num_experts(experts)
    router = _router_name(holder, experts_name, num_experts)
    shared = tuple(
        f"{module_path}.{name}"
        for name, child in module.named_children()
        if name not in (experts_name, router) and "shared" in name and any(True for _ in child.parameters())
    )
    holders = [holder.get_submodule(router), holder] if router else [holder]
    num_groups = _first_int([*holders, module, config], ("num_group", *_GROUPS), 1)
    if any(getattr(holder, "topk_method", None) == "greedy" for holder in [*holders, config]):
        num_groups = 1
    return MoELayer(
        module=module_path,
        experts=experts_path,
        router=f"{holder_path}.{router}" if router else None,
        shared_experts=shared,
        num_experts=num_experts,
        top_k=_first_int([*holders, module, config], _TOP_K, 1),
        num_groups=num_groups,
        groups_kept=_first_int([*holders, module, config], _GROUPS_KEPT, 1) if num_groups > 1 else 1,
        inline=module_path == block,
    )


def _common_parent(paths: Sequence[str]) -> str:
    words = [path.split(".") for path in paths]
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    return ".".join(column[0] for column in alike)


def _num_experts(experts: nn.Module) -> int:
    if isinstance(experts, LinearExperts2D):
        return len(expert_modules(experts))
    with disable_onloading():
        return experts.down_proj.shape[0]


def _router_name(module: nn.Module, experts_name: str, num_experts: int) -> str | None:
    """The child of an MoE layer that holds a parameter with one row per expert.

    A router that scores something besides the experts (shared ones, or none at all) has more rows; it goes by
    its name.
    """
    named = None
    with disable_onloading():
        for name, child in module.named_children():
            parameters = dict(child.named_parameters())
            is_mlp = any("down_proj.weight" in path for path in parameters) and name not in _ROUTER_NAMES
            if name == experts_name or not parameters or is_mlp:
                continue
            if any(value.ndim and value.shape[0] == num_experts for value in parameters.values()):
                return name
            if name in _ROUTER_NAMES:
                named = name
    return named


def _first_int(holders: list[object], names: tuple[str, ...], default: int) -> int:
    for holder in holders:
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default
