"""llm-compressor modifiers: lifecycle only; they call profile, plan and surgery."""

from llmcompressor_moe.modifiers.block_drop import BlockDropModifier
from llmcompressor_moe.modifiers.expert_drop import ExpertDropModifier
from llmcompressor_moe.modifiers.expert_sparsity import ExpertSparsityModifier
from llmcompressor_moe.modifiers.expert_width import ExpertWidthModifier
from llmcompressor_moe.modifiers.layer_drop import LayerDropModifier
from llmcompressor_moe.modifiers.quality_gate import QualityGateModifier
from llmcompressor_moe.modifiers.router_aware_quant import RouterAwareQuantModifier
from llmcompressor_moe.modifiers.router_calibration import RouterCalibrationModifier

__all__ = [
    "BlockDropModifier",
    "ExpertDropModifier",
    "ExpertSparsityModifier",
    "ExpertWidthModifier",
    "LayerDropModifier",
    "QualityGateModifier",
    "RouterAwareQuantModifier",
    "RouterCalibrationModifier",
]
