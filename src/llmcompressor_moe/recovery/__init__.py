"""Win back what trimming and quantization cost: finetuning and distillation from the base model."""
