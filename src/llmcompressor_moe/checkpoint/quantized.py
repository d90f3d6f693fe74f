"""Load compressed experts in transformers as they were compressed: one Linear per projection and expert.

transformers itself decompresses the experts of a checkpoint while it stacks them. That works for families
whose own checkpoints keep experts apart, if all experts of the model were compressed by one scheme; the
others keep random weights, with a warning only. Here the model gets linearized experts before the weights are
read, so every Linear finds its tensors and its own scheme, whatever the family, and stays compressed.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from typing import Any

from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from llmcompressor_moe.checkpoint.names import expert_names
from llmcompressor_moe.topology import text_config

__all__ = ["compressed_experts_as_linears", "linear_experts"]

_EXPERT_TENSOR = re.compile(r"\.(\d+)\.(?:[^.]+\.)*?experts\.(\d+)\.([^.]+)\.([^.]+)$")
_LAYER = re.compile(r"\.(\d+)\.")


@contextlib.contextmanager
def compressed_experts_as_linears() -> Iterator[None]:
    """Context in which transformers' compressed-tensors quantizer builds linearized experts."""
    prepare = CompressedTensorsHfQuantizer._process_model_before_weight_loading
    convert = CompressedTensorsHfQuantizer.update_weight_conversions

    @functools.wraps(prepare)
    def prepare_linears(self: CompressedTensorsHfQuantizer, model: PreTrainedModel, **kwargs: Any) -> None:
        names = _checkpoint_names(model)
        stored = _stored_experts(kwargs.get("checkpoint_files") or [], names)
        linearized = _linearize(model, {layer for layer, *_ in stored})
        self._expert_renamings = _renamings(names) if linearized else None
        # The config may name modules as the checkpoint does, not as transformers does; tensors do not lie.
        quantization = self.compressor.quantization_config
        quantization.ignore = [*(quantization.ignore or []), *_plain_linears(linearized, stored)]
        prepare(self, model, **kwargs)

    @functools.wraps(convert)
    def convert_linears(
        self: CompressedTensorsHfQuantizer, conversions: list[WeightTransform]
    ) -> list[WeightTransform]:
        if self._expert_renamings is None:
            return convert(self, conversions)
        kept = [conversion for conversion in conversions if not _stacks_experts(conversion)]
        return convert(self, kept) + self._expert_renamings

    CompressedTensorsHfQuantizer._process_model_before_weight_loading = prepare_linears
    CompressedTensorsHfQuantizer.update_weight_conversions = convert_linears
    # Inherited; it splits Llama 4's experts by the config's one count for all layers.
    CompressedTensorsHfQuantizer._convert_model_for_quantization = lambda self, model: None
    try:
        yield
    finally:
        del CompressedTensorsHfQuantizer._convert_model_for_quantization
        CompressedTensorsHfQuantizer._process_model_before_weight_loading = prepare
        CompressedTensorsHfQuantizer.update_weight_conversions = convert


def _checkpoint_names(model: PreTrainedModel) -> dict[str, str]:
    """An expert's projections: names in the family's checkpoints -> in linearized experts, where they differ."""
    names = expert_names(text_config(model.config).model_type)
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
        model.set_submodule(path, linear_experts(experts, config))
        _needs_no_initialization(model.get_submodule(path.rpartition(".")[0]))
        linearized[int(match[1])] = path
    return linearized


def _plain_linears(experts: dict[int, str], stored: dict[tuple[int, int, str], set[str]]) -> list[str]:
    """Module paths of the expert projections that were stored uncompressed."""
    return [
        f"{experts[layer]}.{expert}.{name}"
        for (layer, expert, name), kinds in stored.items()
        if layer in experts and "weight_scale" not in kinds
    ]


def _needs_no_initialization(moe: nn.Module) -> None:
    """Keep transformers from initializing fused experts that are gone; some families do from the MoE layer."""
    if not [*moe.parameters(recurse=False), *moe.buffers(recurse=False)]:
        moe._is_hf_initialized = True


def linear_experts(experts: nn.Module, config: PreTrainedConfig) -> LinearExperts2D:
    """Linearize experts that are not loaded yet, on the device (meta) that is in force."""
    linear_cls = LinearExperts2D.get_linear_experts_cls(type(experts))
    with contextlib.ExitStack() as patches:
        for module in {sys.modules[cls.__module__] for cls in linear_cls.__mro__}:
            if hasattr(module, "offload_module"):
                # There is nothing to offload before weights are loaded, and upstream cannot for the meta
                # device.
                patches.enter_context(patch_attr(module, "offload_module", lambda module, **_: None))
        return linear_cls.from_experts_module(experts, config)


def _stacks_experts(conversion: WeightTransform) -> bool:
    return isinstance(conversion, WeightConverter) and any(
        re.search(r"experts\.\*\.", source) for source in conversion._original_source_patterns
    )


def _renamings(names: dict[str, str]) -> list[WeightTransform]:
    """From the names of a family's checkpoints to those of linearized experts; names already so stay."""
    return [
        WeightRenaming(rf"\.experts\.(\d+)\.{own}\.", rf".experts.\1.{name}.") for own, name in names.items()
    ]
