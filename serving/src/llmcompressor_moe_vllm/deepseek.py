"""Lets vLLM read the config of DeepSeek-MoE (`model_type` "deepseek") without running code of the checkpoint.

vLLM has the model (`DeepseekForCausalLM`). Neither vLLM nor transformers has a class for its config.
"""

from typing import ClassVar

from transformers import AutoConfig, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class DeepseekConfig(LlamaConfig):
    """LLaMA's config; everything about experts is taken from the file as it stands there."""

    model_type = "deepseek"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}


def register_config() -> None:
    """Register the class, unless this transformers has one of its own or it was registered before."""
    if DeepseekConfig.model_type not in CONFIG_MAPPING:
        AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig)
