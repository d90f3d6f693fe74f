"""Lets vLLM summarize a config with multi-head latent attention whose layers differ only in their experts.

vLLM summarizes a heterogeneous config layer by layer, and refuses to for latent attention, whose head
sizes it corrects on the config itself. Where only the experts differ there is nothing to summarize by
layer: the global values hold for attention, and the global expert count is the largest."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from llmcompressor_moe_vllm.config_view import global_reads_allowed
from llmcompressor_moe_vllm.overrides import read_plan

if TYPE_CHECKING:
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase


def wrap_convert(convert: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `ModelArchConfigConvertorBase.convert`, taking the global values in the case above."""

    @wraps(convert)
    def convert_by_global_values(
        convertor: "ModelArchConfigConvertorBase", supports_multimodal: bool = True
    ) -> Any:
        plan = read_plan(convertor.hf_text_config) if convertor.is_deepseek_mla() else {}
        if not plan or any(override.foreign for override in plan.values()):
            return convert(convertor, supports_multimodal)
        with global_reads_allowed(convertor.hf_config, convertor.hf_text_config):
            return convertor.convert_layer(supports_multimodal)

    return convert_by_global_values
