"""The entry point that vLLM calls in every one of its processes, before any model is imported."""

import logging

from llmcompressor_moe_vllm.deepseek import register_config

logger = logging.getLogger("vllm.llmcompressor_moe")


def register() -> None:
    """Register configs, and wrap the functions of vLLM that build models. Calling it again changes nothing.

    A vLLM without these functions is left alone, with a warning: it refuses checkpoints with differing
    layers itself, and must still serve all others.
    """
    register_config()
    try:
        from vllm.model_executor.model_loader import utils as loading
        from vllm.model_executor.models import utils as models
        from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

        from llmcompressor_moe_vllm.building import wrap_initialize_model, wrap_make_layers
        from llmcompressor_moe_vllm.latent_attention import wrap_convert
        from llmcompressor_moe_vllm.patching import wrap_everywhere

        targets = [
            (models, "make_layers", wrap_make_layers),
            (loading, "initialize_model", wrap_initialize_model),
            (ModelArchConfigConvertorBase, "convert", wrap_convert),
        ]
        for home, name, _ in targets:
            getattr(home, name)
    except (ImportError, AttributeError) as error:
        logger.warning(
            "llmcompressor-moe-vllm does not know this vLLM (%s): checkpoints with per_layer_config will be "
            "refused. Install a version of the plugin made for it.",
            error,
        )
        return
    for home, name, wrapper in targets:
        wrap_everywhere(home, name, wrapper)
