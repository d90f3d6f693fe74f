"""llm-compressor: linearized experts, smoothing, calibration, recipes and sessions."""

__all__ = ["HOLDS_FOR"]

HOLDS_FOR = "llmcompressor>=0.14.0,<0.15"
