"""An opened model rounds activations as its checkpoint says: inputs of quantized layers, keys and values."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.modeling import initialize_hooked_kv_cache
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.cache import add, forget
from llmcompressor_moe.checkpoint.opened import OpenedCheckpoint, opened_from, opened_module
from llmcompressor_moe.checkpoint.sources import Computed, Leaf, Source

__all__ = ["round_activations"]

_INPUT_SCALES = ("input_scale", "input_zero_point", "input_global_scale")
_CACHE_SCALES = ("k_scale", "k_zero_point", "v_scale", "v_zero_point")


def round_activations(model: PreTrainedModel) -> None:
    """Round inputs, keys and values of an opened model by the schemes of its checkpoint, in place.

    Only checkpoints of compressed-tensors say how. Scales that are stored are read when they are used.

    :raises ValueError: a scale that a scheme demands is not stored; names it
    """
    opened = opened_from(model)
    added: list[torch.Tensor] = []
    for path, module in model.named_modules():
        origin = opened_module(module)
        source = origin.sources.get("weight") if origin is not None else None
        leaves = list(source.leaves()) if source is not None else []
        inputs = next((leaf.encoded.inputs for leaf in leaves if leaf.encoded is not None), None)
        if inputs is not None:
            scales = {name: found for name in _INPUT_SCALES if (found := _scale(leaves, name)) is not None}
            if not inputs.dynamic and "input_scale" not in scales:
                raise ValueError(
                    f"{opened.path}: {path} rounds its inputs by a stored scale, but its files lack input_scale; "
                    "copy the checkpoint again."
                )
            added += [add(module, name, scale) for name, scale in scales.items()]
            _mark(module, inputs)
            module.register_forward_pre_hook(_round_input)
    added += _round_cache(model, opened)
    weakref.finalize(model, forget, added)


def _scale(leaves: Sequence[Leaf], name: str) -> Source | None:
    """A scale of the inputs that several stored weights share: the largest, as engines take that fuse them."""
    found = [
        Leaf(leaf.stored, leaf.encoded.parts[name], leaf.dtype)
        for leaf in leaves
        if leaf.encoded is not None and name in leaf.encoded.parts
    ]
    if len(found) < 2:
        return found[0] if found else None
    return Computed(found, lambda values: torch.stack(values).amax(0), found[0].meta)


def _mark(module: nn.Module, activations: QuantizationArgs) -> None:
    """Say what a module rounds, where compressed-tensors looks; its weight is rounded already."""
    module.quantization_scheme = QuantizationScheme(targets=[], input_activations=activations)
    module.quantization_status = QuantizationStatus.FROZEN


def _round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    value, *rest = args
    return forward_quantize(module, value, "input", module.quantization_scheme.input_activations), *rest


def _round_cache(model: PreTrainedModel, opened: OpenedCheckpoint) -> list[torch.Tensor]:
    if (opened.quantization or {}).get("quant_method") != "compressed-tensors":
        return []
    scheme = QuantizationConfig.model_validate(opened.quantization).kv_cache_scheme
    if scheme is None:
        return []
    added = []
    for path, module in model.named_modules():
        if not is_cached_attention_module(module):
            continue
        stored = {name: f"{opened.stored_modules.get(path, path)}.{name}" for name in _CACHE_SCALES}
        known = {name: opened.logical[full] for name, full in stored.items() if full in opened.logical}
        if not scheme.dynamic and not {"k_scale", "v_scale"} <= known.keys():
            raise ValueError(
                f"{opened.path}: quantization_config.kv_cache_scheme demands {stored['k_scale']} and "
                f"{stored['v_scale']}, which its files lack; copy the checkpoint again."
            )
        added += [add(module, name, scale) for name, scale in known.items()]
        initialize_hooked_kv_cache(model, module)
        _mark(module, scheme)
    return added
