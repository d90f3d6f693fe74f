"""What one look at a model with calibration data tells about everything that could be cut or rounded."""

from llmcompressor_moe.evidence.collect import collect_evidence
from llmcompressor_moe.evidence.data import Evidence, LayerEvidence

__all__ = ["Evidence", "LayerEvidence", "collect_evidence"]
