"""What llm-compressor's own modifiers need to keep an MoE model's function, and to run where it runs."""
