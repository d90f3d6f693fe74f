"""Trim Mixture-of-Experts models with llm-compressor, and serve them with vLLM.

Importing this package registers its modifiers, so that YAML recipes can name them.
"""

from llmcompressor.modifiers.factory import ModifierFactory

import llmcompressor_moe.architectures  # noqa: F401
from llmcompressor_moe.checkpoint.opened import is_opened
from llmcompressor_moe.checkpoint.reader import load_trimmed_moe
from llmcompressor_moe.compat.compressed_tensors import scale_each_token
from llmcompressor_moe.compat.llmcompressor.linear_experts import register_linearizations
from llmcompressor_moe.compat.llmcompressor.validation import accept_decoded_models
from llmcompressor_moe.compat.transformers.models import complete_configs
from llmcompressor_moe.modifiers import (
    BlockDropModifier,
    ExpertDropModifier,
    ExpertSparsityModifier,
    ExpertWidthModifier,
    LayerDropModifier,
    QualityGateModifier,
    RouterAwareQuantModifier,
    RouterCalibrationModifier,
)
from llmcompressor_moe.saving.opened import open_moe

__all__ = [
    "BlockDropModifier",
    "ExpertDropModifier",
    "ExpertSparsityModifier",
    "ExpertWidthModifier",
    "LayerDropModifier",
    "QualityGateModifier",
    "RouterAwareQuantModifier",
    "RouterCalibrationModifier",
    "load_trimmed_moe",
    "open_moe",
]

register_linearizations()
scale_each_token()
complete_configs()
accept_decoded_models(is_opened)
for _modifier in (
    BlockDropModifier,
    ExpertDropModifier,
    ExpertSparsityModifier,
    ExpertWidthModifier,
    LayerDropModifier,
    QualityGateModifier,
    RouterAwareQuantModifier,
    RouterCalibrationModifier,
):
    ModifierFactory.register(_modifier.__name__, _modifier)
