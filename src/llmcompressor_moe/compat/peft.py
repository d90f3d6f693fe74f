"""peft: the names of modules that adapters are asked for."""

from __future__ import annotations

import peft.utils.transformers_weight_conversion as weight_conversion
from compressed_tensors.utils import patch_attr
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

__all__ = ["HOLDS_FOR", "adapt_exactly"]

HOLDS_FOR = "peft>=0.21,<0.22"


def adapt_exactly(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put adapters around exactly the modules and parameters that a config names.

    peft takes names of an expert's Linears for those of checkpoints before transformers 5 and adapts the fused
    experts of the whole model instead: also where a shared expert or a linearized one is meant.
    """
    with patch_attr(weight_conversion, "convert_peft_config_for_transformers", lambda *args, **kwargs: None):
        return get_peft_model(model, config)
