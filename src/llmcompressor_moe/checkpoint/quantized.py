"""Load compressed experts in transformers as they were compressed: one Linear per projection and expert.

transformers itself decompresses the experts of a checkpoint while it stacks them. That works for families
whose own checkpoints keep experts apart, if all experts of the model were compressed by one scheme; the
others keep random weights, with a warning only. Here the model gets linearized experts before the weights are
read, so every Linear finds its tensors and its own scheme, whatever the family, and stays compressed.
When it is decompressed, it gets the dtype of the model.
"""

from __future__ import annotations

import contextlib
import re

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

from llmcompressor_moe.checkpoint.decoding import Mxfp4, NvFp4, ScaledFp8
from llmcompressor_moe.checkpoint.names import expert_names
from llmcompressor_moe.compat.compressed_tensors import decompress_in
from llmcompressor_moe.compat.llmcompressor.linear_experts import linearize_without_weights
from llmcompressor_moe.compat.transformers.conversions import not_after, source_patterns
from llmcompressor_moe.compat.transformers.quantizer import needs_no_initialization, prepared_before_weights
from llmcompressor_moe.topology import text_config

__all__ = ["compressed_experts_as_linears"]

_EXPERT_TENSOR = re.compile(r"\.(\d+)\.(?:[^.]+\.)*?experts\.(\d+)\.([^.]+)\.([^.]+)$")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# What stands before the projections of an expert, whether or not the dot behind its number is looked for as well.
_SINGLE_EXPERTS = [
    rf"\.experts\.{number}{dot}" for number in (r"\d", r"\d\d", r"\d\d\d") for dot in ("", r"\.")
]
_LAYER = re.compile(r"\.(\d+)\.")


def compressed_experts_as_linears() -> contextlib.AbstractContextManager[None]:
    """Context in which transformers' compressed-tensors quantizer builds linearized experts."""
    return prepared_before_weights(_prepare, is_obsolete=_stacks_experts, narrowed=_beside_single_experts)


def _prepare(
    model: PreTrainedModel, compressor: ModelCompressor, files: list[str]
) -> list[WeightTransform] | None:
    decompress_in(compressor, model.dtype, _decode)
    quantization = compressor.quantization_config
    names = _checkpoint_names(model)
    stored = _stored_experts(files, names)
    linearized = _linearize(model, {layer for layer, *_ in stored})
    # The config may name modules as the checkpoint does, not as transformers does; tensors do not lie.
    quantization.ignore = [*(quantization.ignore or []), *_plain_linears(linearized, stored)]
    return _renamings(names) if linearized else None


def _decode(stored: dict[str, torch.Tensor], scheme: QuantizationScheme, dtype: torch.dtype) -> torch.Tensor:
    codec = ScaledFp8 if scheme.weights.num_bits == 8 else NvFp4 if "weight_global_scale" in stored else Mxfp4
    return codec(scheme.weights).decode(stored, dtype)


def _checkpoint_names(model: PreTrainedModel) -> dict[str, str]:
    """An expert's projections: names in the family's checkpoints -> in linearized experts, where they differ."""
    names = expert_names(model.config)
    return {own: name for name, own in names.projections.items() if own != name} if names else {}


def _stored_experts(files: list[str], names: dict[str, str]) -> dict[tuple[int, int, str], set[str]]:
    """(layer, expert, projection) -> kinds of tensors that safetensors files hold: weight, weight_scale, ..."""
    found: dict[tuple[int, int, str], set[str]] = {}
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for layer, expert, name, kind in filter(None, map(_parse, tensors.keys())):
                    found.setdefault((layer, expert, names.get(name, name)), set()).add(kind)
    return found


def _parse(name: str) -> tuple[int, int, str, str] | None:
    match = _EXPERT_TENSOR.search(name)
    return (int(match[1]), int(match[2]), match[3], match[4]) if match else None


def _linearize(model: PreTrainedModel, layers: set[int]) -> dict[int, str]:
    """Linearize the experts of some layers (on the meta device) in place; layer -> path of its experts."""
    linearized = {}
    for path, experts in get_non_linearized_moes(model):
        match = _LAYER.search(path)
        if match is None or int(match[1]) not in layers:
            continue
        # Experts know the config of their own layer, which counts them.
        config = getattr(experts, "config", text_config(model.config))
        model.set_submodule(path, linearize_without_weights(experts, config))
        _spare_initialization(model.get_submodule(path.rpartition(".")[0]))
        linearized[int(match[1])] = path
    return linearized


def _plain_linears(experts: dict[int, str], stored: dict[tuple[int, int, str], set[str]]) -> list[str]:
    """Module paths of the expert projections that were stored uncompressed."""
    return [
        f"{experts[layer]}.{expert}.{name}"
        for (layer, expert, name), kinds in stored.items()
        if layer in experts and "weight_scale" not in kinds
    ]


def _spare_initialization(moe: nn.Module) -> None:
    """Keep transformers from initializing fused experts that are gone; some families do from the MoE layer."""
    if not [*moe.parameters(recurse=False), *moe.buffers(recurse=False)]:
        needs_no_initialization(moe)


def _stacks_experts(conversion: WeightTransform) -> bool:
    return isinstance(conversion, WeightConverter) and any(
        re.search(r"experts\.\*\.", source) for source in source_patterns(conversion)
    )


def _beside_single_experts(conversion: WeightTransform) -> WeightTransform:
    """A conversion for dense layers may name projections alone; those of single experts are not meant."""
    if not isinstance(conversion, WeightConverter):
        return conversion
    reaches = any(conversion.rename_source_key(f".experts.0.{name}.weight")[1] for name in _PROJECTIONS)
    return not_after(conversion, _SINGLE_EXPERTS) if reaches else conversion


def _renamings(names: dict[str, str]) -> list[WeightTransform]:
    """From the names of a family's checkpoints to those of linearized experts; names already so stay."""
    return [
        WeightRenaming(rf"\.experts\.(\d+)\.{own}\.", rf".experts.\1.{name}.") for own, name in names.items()
    ]
