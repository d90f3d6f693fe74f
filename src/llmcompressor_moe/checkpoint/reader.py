"""Load trimmed checkpoints in transformers.

transformers reads ``per_layer_config`` into the config but does not build models from it yet. While the
context of `load_trimmed_moe` is open, every block is built from its own layer's config, and a dropped MoE
layer becomes a `SkippedMoE`.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from llmcompressor.modeling.moe.linearize import get_linearized_moes, get_non_linearized_moes
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmcompressor_moe.checkpoint.overrides import (
    MoEOverride,
    moe_overrides,
    tolerant_configs,
)
from llmcompressor_moe.checkpoint.quantized import compressed_experts_as_linears
from llmcompressor_moe.compat.transformers.building import blocks_built_by
from llmcompressor_moe.compat.transformers.per_layer import allow_global_access
from llmcompressor_moe.surgery.skipped import SkippedMoE
from llmcompressor_moe.topology import NotAnMoEError, expert_modules, find_topology

__all__ = ["load_trimmed_moe"]

_open_contexts = 0


@contextlib.contextmanager
def load_trimmed_moe() -> Iterator[None]:
    """Context in which transformers loads trimmed checkpoints, quantized ones as well.

    Inside it ``from_pretrained`` and ``from_config`` of every Auto class and model class build each layer
    from the config's ``per_layer_config``: without its MoE where that is skipped, with its own number of
    experts. Checkpoints whose MoE layers are all alike load as they would without it. Loaded models work on
    after the context closes, and ``save_pretrained`` writes them in the same format.

    Example::

        with load_trimmed_moe():
            model = AutoModelForCausalLM.from_pretrained("trimmed")

    :raises ValueError: (while loading) ``per_layer_config`` contradicts itself or the model; the message
        names the layer, the value and what to do
    """
    global _open_contexts
    _open_contexts += 1
    try:
        if _open_contexts > 1:
            yield
            return
        with (
            tolerant_configs(),
            compressed_experts_as_linears(),
            blocks_built_by(_blocks_to_change, _build_block, _check_built),
        ):
            yield
    finally:
        _open_contexts -= 1


def _blocks_to_change(model_cls: type[PreTrainedModel], config: PreTrainedConfig) -> set[type[nn.Module]]:
    """Classes of blocks that must be built from their own layer's config, which is permitted to be read."""
    if not moe_overrides(config):
        return set()
    allow_global_access(config)
    return _block_classes(model_cls)


def _check_built(model: PreTrainedModel) -> None:
    overrides = moe_overrides(model.config)
    if overrides:
        _check_model(model, overrides)


def _block_classes(model_cls: type[PreTrainedModel]) -> set[type[nn.Module]]:
    """The classes of a model's blocks: not to be split, and built from a config and an index."""
    module = sys.modules[model_cls.__module__]
    named = [getattr(module, name, None) for name in model_cls._no_split_modules or ()]
    return {cls for cls in named if cls and {"config", "layer_idx"} <= set(inspect.signature(cls).parameters)}


def _build_block(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a block class's ``__init__``: build the block from its own layer's config."""
    signature = inspect.signature(original)

    def init(block: nn.Module, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(block, *args, **kwargs)
        config, index = call.arguments["config"], call.arguments["layer_idx"]
        override = moe_overrides(config).get(index)
        if override is None:
            return original(block, *args, **kwargs)
        layer_config = call.arguments["config"] = config.per_layer_config[index]
        if override.skipped:
            # Not every MoE can be built without experts, even if only to be thrown away.
            for name in override.counts:
                setattr(layer_config, name, getattr(config, name))
        original(*call.args, **call.kwargs)
        name = _moe_name(block, index, override)
        moe = getattr(block, name) if name else None
        if override.skipped:
            setattr(block, name, SkippedMoE.for_module(moe, block))
        _share_config(block, layer_config, config, moe)

    return init


def _experts(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return [*get_non_linearized_moes(block), *get_linearized_moes(block)]


def _moe_name(block: nn.Module, index: int, override: MoEOverride) -> str:
    """Name of the child of a block that is its MoE layer; empty where router and experts are children too."""
    paths = [path for path, _ in _experts(block)]
    said = f'per_layer_config["{index}"] says "skip"' if override.skipped else _said(index, override)
    if not paths:
        raise ValueError(
            f"{said}, but layer {index} ({type(block).__name__}) has no MoE layer. Remove the entry."
        )
    if "." in paths[0]:
        return paths[0].split(".")[0]
    if override.skipped:
        raise ValueError(
            f"{said}, but {type(block).__name__} keeps its router and experts directly in the block, beside "
            "a dense feed-forward: there is no MoE layer to leave out. Drop experts or whole blocks instead."
        )
    return ""


def _share_config(
    block: nn.Module, own: PreTrainedConfig, shared: PreTrainedConfig, moe: nn.Module | None
) -> None:
    """Give everything in a block but its MoE the model's config back, so that it sees later changes to it."""
    inside = set(moe.modules()) if moe is not None else {module for _, module in _experts(block)}
    for module in block.modules():
        if module not in inside and vars(module).get("config") is own:
            module.config = shared


def _said(index: int, override: MoEOverride) -> str:
    said = {**override.counts, **override.widths}
    return ", ".join(f'per_layer_config["{index}"].{name} is {value}' for name, value in said.items())


def _check_model(model: PreTrainedModel, overrides: dict[int, MoEOverride]) -> None:
    """Raise ValueError unless a model's MoE layers are those that its config speaks of, and can route."""
    try:
        moe_layers = find_topology(model).moe_layers
    except NotAnMoEError:  # every MoE layer was dropped
        moe_layers = {}
    for index, override in overrides.items():
        moe = moe_layers.get(index)
        built = 0 if moe is None else moe.num_experts
        if override.widths and moe is not None:
            shape = _down_shape(model.get_submodule(moe.experts))
            if not set(shape) & set(override.widths.values()):
                raise ValueError(
                    f"{_said(index, override)}, but {type(model).__name__} built down projections of the shape "
                    f"{tuple(shape)}. Load this checkpoint with a model class of transformers itself."
                )
        if not (override.skipped or override.counts):
            continue
        if built not in ([0] if override.skipped else override.counts.values()):
            raise ValueError(
                f"{type(model).__name__} built {built} experts in layer {index} although its config differs "
                f"({override}): its blocks could not be found by `_no_split_modules`. Load this checkpoint "
                "with a model class of transformers itself."
            )
        if moe is not None and moe.num_experts < moe.min_experts:
            raise ValueError(
                f"{_said(index, override)}, fewer than the {moe.min_experts} that its router needs to choose "
                f"{moe.top_k} experts. Keep more experts in this layer, or drop its MoE whole."
            )
        if moe is not None and moe.num_experts % moe.num_groups:
            raise ValueError(
                f"{_said(index, override)}, which does not divide into the router's {moe.num_groups} groups. "
                "Keep the same number of experts in every group."
            )


def _down_shape(experts: nn.Module) -> torch.Size:
    linear = expert_modules(experts)
    return linear[0].down_proj.weight.shape if linear else experts.down_proj.shape
