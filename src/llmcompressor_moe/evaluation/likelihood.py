"""Log-likelihoods of tokens under causal language models, and the perplexity of tokenized text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from llmcompressor_moe.evaluation.windows import Document, Window, batches

__all__ = [
    "evaluation_mode",
    "mean_negative_log_likelihood",
    "perplexity",
    "perplexity_of",
    "require_finite",
    "summed",
    "total_negative_log_likelihood",
    "window_logits",
    "window_losses",
]


@contextlib.contextmanager
def evaluation_mode(model: Module) -> Iterator[None]:
    """Without gradients and training mode; the mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def window_logits(
    model: Module, documents: Sequence[Document], batch: Sequence[Window]
) -> tuple[Tensor, Tensor]:
    """Logits of the predictions that count, and the tokens they should have predicted.

    :param model: a causal language model of transformers (called as ``model(input_ids=...)``, read by
        ``.logits``)
    :param batch: windows of one shape
    :return: [windows, scored, vocabulary] in the model's dtype, and [windows, scored] token ids, both on the
        device of the logits
    :raises FloatingPointError: logits are NaN or infinite; names the window
    """
    device = next(model.parameters()).device
    inputs = torch.stack([documents[w.document].token_ids[w.begin : w.end] for w in batch])
    targets = torch.stack([documents[w.document].token_ids[w.end + 1 - w.scored : w.end + 1] for w in batch])
    logits = model(input_ids=inputs.to(device), use_cache=False).logits[:, -targets.shape[1] :]
    # The maximum, because single logits may be -inf on purpose: tokens that a model never says.
    require_finite(logits.amax(-1), batch, "the model's logits are NaN or infinite")
    return logits, targets.to(logits.device)


def require_finite(values: Tensor, batch: Sequence[Window], problem: str) -> None:
    """Refuse numbers, [windows, scored], that are not finite.

    :raises FloatingPointError: says what ``problem`` is and in which window
    """
    finite = values.isfinite().flatten(1).all(1)
    if not finite.all():
        raise FloatingPointError(
            f"{problem} in {batch[int(finite.int().argmin())]}; float16 overflows where bfloat16 and float32 do "
            "not, and a compressed model may be broken"
        )


def window_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target in nats, [windows, scored], with a softmax in float32; infinite where p is zero."""
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    return flat.view(targets.shape)


def summed(losses: Tensor, batch: Sequence[Window]) -> Tensor:
    """The sum over a batch in float64, on the CPU.

    :raises FloatingPointError: a token of the text has probability zero; names the window
    """
    require_finite(losses, batch, "a token of the text has probability zero")
    return losses.double().sum().cpu()


def total_negative_log_likelihood(
    model: Module,
    documents: Sequence[Document],
    windows: Sequence[Window],
    batch_size: int = 1,
    description: str | None = None,
) -> float:
    """The sum of -log p(token | tokens before it in its window) over all predictions that count, in nats.

    The softmax is taken in float32 and the sum kept in float64, whatever the dtype of the model. A batch takes
    ``batch_size`` * length * vocabulary logits, once in the model's dtype and twice in float32.

    :param description: of the progress bar; None shows none
    :raises FloatingPointError: logits are NaN or infinite, or a token of the text has probability zero; names
        the window
    """
    total = torch.zeros((), dtype=torch.float64)
    with evaluation_mode(model):
        for batch in tqdm(
            batches(windows, batch_size), desc=description, leave=False, disable=description is None or None
        ):
            losses = window_losses(*window_logits(model, documents, batch))
            total += summed(losses, batch)
    return total.item()


def mean_negative_log_likelihood(model: Module, token_ids: Tensor, batch_size: int = 8) -> float:
    """The mean of -log p(token | tokens before it in its sequence), in nats.

    :param model: a causal language model of transformers
    :param token_ids: integers, (sequences, length), no padding. Each sequence predicts length - 1 tokens; every
        predicted token weighs the same
    :param batch_size: sequences per forward
    :raises ValueError: ``token_ids`` is not two-dimensional, predicts nothing, or ``batch_size`` is not positive
    :raises FloatingPointError: logits are NaN or infinite
    """
    if token_ids.ndim != 2 or token_ids.shape[0] < 1 or token_ids.shape[1] < 2:
        raise ValueError(
            f"token_ids has shape {tuple(token_ids.shape)}; give (sequences, length) with at least one "
            "sequence of at least two tokens"
        )
    documents = [Document(row, 0) for row in token_ids.cpu().long()]
    sequences, targets = token_ids.shape[0], token_ids.shape[1] - 1
    whole = [Window(index, 0, targets, targets) for index in range(sequences)]
    return total_negative_log_likelihood(model, documents, whole, batch_size) / (sequences * targets)


def perplexity(model: Module, token_ids: Tensor, batch_size: int = 8) -> float:
    """exp of `mean_negative_log_likelihood` (same arguments, same errors)."""
    return perplexity_of(mean_negative_log_likelihood(model, token_ids, batch_size))


def perplexity_of(mean_nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where a float cannot hold it."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
