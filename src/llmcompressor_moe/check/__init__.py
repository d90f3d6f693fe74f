"""Says whether a checkpoint directory is legal to serve, without loading the model.

Read are config.json, the headers of the safetensors files, the index, and a few bytes of tensors that hold
shapes. The model is built on the meta device, from transformers' own classes; code that comes with a
checkpoint is never run.
"""

from llmcompressor_moe.check.report import CheckReport, Finding, IllegalCheckpointError, Severity
from llmcompressor_moe.check.run import check_checkpoint

__all__ = ["CheckReport", "Finding", "IllegalCheckpointError", "Severity", "check_checkpoint"]
