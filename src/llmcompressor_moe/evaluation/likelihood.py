"""What a model is worth: the perplexity of causal language models on tokenized text."""

import math

import torch
from torch import Tensor
from torch.nn import Module


@torch.no_grad()
def mean_negative_log_likelihood(model: Module, token_ids: Tensor, batch_size: int = 8) -> float:
    """Return the mean of -log p(token | tokens before it in its sequence), in nats.

    Args:
        model: a causal language model of transformers (called as `model(input_ids=...)`, read by `.logits`).
        token_ids: integers, (sequences, length), no padding. Each sequence predicts length - 1 tokens; every
            predicted token weighs the same.
        batch_size: sequences per forward.

    The softmax is taken in float32 and the sum kept in float64, whatever the dtype of the model. Training
    mode is switched off for the measurement and restored afterwards.

    Raises:
        ValueError: `token_ids` is not two-dimensional, predicts nothing, or `batch_size` is not positive.
    """
    if token_ids.ndim != 2 or token_ids.shape[0] < 1 or token_ids.shape[1] < 2:
        raise ValueError(
            f"token_ids has shape {tuple(token_ids.shape)}; give (sequences, length) with at least one "
            "sequence of at least two tokens"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    try:
        for batch in token_ids.split(batch_size):
            batch = batch.to(device=device, dtype=torch.long)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
            )
            total += losses.double().sum().cpu()
    finally:
        model.train(was_training)
    return total.item() / (token_ids.shape[0] * (token_ids.shape[1] - 1))


def perplexity(model: Module, token_ids: Tensor, batch_size: int = 8) -> float:
    """Return exp of `mean_negative_log_likelihood` (same arguments, same errors)."""
    return math.exp(mean_negative_log_likelihood(model, token_ids, batch_size))
