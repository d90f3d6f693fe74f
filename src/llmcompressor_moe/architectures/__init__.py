"""Architectures that transformers has no class for, built from its own parts and registered with it.

Importing this package is enough: the Auto classes of transformers then read their configs and build their models,
and no code of a checkpoint is run.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from llmcompressor_moe.architectures.deepseek import DeepseekConfig, DeepseekForCausalLM
from llmcompressor_moe.compat.transformers.conversions import convert_like

__all__ = ["DeepseekConfig", "DeepseekForCausalLM", "is_brought"]

AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig, exist_ok=True)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
# Single experts under mlp.experts.<index>.{gate,up,down}_proj.
convert_like(DeepseekConfig.model_type, "qwen2_moe")


def is_brought(model_type: str) -> bool:
    """Whether readers need something of this project for a family, whatever was done to the model.

    In transformers they have to import `llmcompressor_moe` first. vLLM needs the plugin, for the config.
    """
    return model_type == DeepseekConfig.model_type
