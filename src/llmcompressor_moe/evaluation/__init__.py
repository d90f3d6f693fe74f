"""What a model is worth, what compression changed, and what running it costs."""

from llmcompressor_moe.evaluation.likelihood import mean_negative_log_likelihood, perplexity

__all__ = ["mean_negative_log_likelihood", "perplexity"]
