"""Log-likelihoods of tokens under causal language models, and the perplexity of tokenized text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from llmcompressor_moe.compat.compressed_tensors import is_offloaded
from llmcompressor_moe.evaluation.windows import Document, Window, batches
from llmcompressor_moe.profile.forward import run_batches

__all__ = [
    "evaluation_mode",
    "mean_negative_log_likelihood",
    "perplexity",
    "perplexity_of",
    "predict_windows",
    "require_finite",
    "summed",
    "total_negative_log_likelihood",
    "window_losses",
]

# Logits that are in float32 at a time: 64 MB.
_CHUNK = 1 << 24


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


def predict_windows(
    model: PreTrainedModel,
    documents: Sequence[Document],
    grouped: Sequence[Sequence[Window]],
    on_logits: Callable[[int, Tensor, Tensor], None],
    description: str | None = None,
) -> None:
    """Let a model predict windows: block by block, all of them together, so that a model that is opened or
    offloaded is read once, whatever the number of windows.

    Quantized modules run as they will be served. 16-bit models are computed in the dtype that
    `computing.fast_dtype` gives.

    :param grouped: batches of windows of one shape
    :param on_logits: called for each batch, in order, with its index, the logits of the predictions that count,
        [windows, scored, vocabulary], in the dtype that the model is computed in, and the tokens that they should
        have predicted, [windows, scored], both on the model's device. One batch has logits at a time
    :param description: of the progress bar; None shows none
    :raises FloatingPointError: logits are NaN or infinite; names the window
    """

    def take(index: int, logits: Tensor) -> None:
        targets = _targets(documents, grouped[index])
        counting = logits[:, -targets.shape[1] :]
        _require_usable(counting, grouped[index])
        on_logits(index, counting, targets.to(logits.device))

    inputs = [{"input_ids": _inputs(documents, batch)} for batch in grouped]
    run_batches(model, inputs, None, description, quantized=True, on_logits=take)


def _predict_whole(
    model: Module,
    documents: Sequence[Document],
    grouped: Sequence[Sequence[Window]],
    on_logits: Callable[[int, Tensor, Tensor], None],
) -> None:
    """The same in one call of the model per batch."""
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for index, batch in enumerate(grouped):
            targets = _targets(documents, batch)
            inputs = _inputs(documents, batch).to(device)
            logits = model(input_ids=inputs, use_cache=False).logits[:, -targets.shape[1] :]
            _require_usable(logits, batch)
            on_logits(index, logits, targets.to(logits.device))


def _inputs(documents: Sequence[Document], batch: Sequence[Window]) -> Tensor:
    return torch.stack([documents[w.document].token_ids[w.begin : w.end] for w in batch])


def _targets(documents: Sequence[Document], batch: Sequence[Window]) -> Tensor:
    return torch.stack([documents[w.document].token_ids[w.end + 1 - w.scored : w.end + 1] for w in batch])


def _require_usable(logits: Tensor, batch: Sequence[Window]) -> None:
    # The maximum, because single logits may be -inf on purpose: tokens that a model never says.
    require_finite(logits.amax(-1), batch, "the model's logits are NaN or infinite")


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
    rows = max(1, _CHUNK // logits.shape[-1])
    parts = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    losses = [
        torch.nn.functional.cross_entropy(some.float(), wanted, reduction="none") for some, wanted in parts
    ]
    return torch.cat(losses).view(targets.shape)


def summed(losses: Tensor, batch: Sequence[Window]) -> Tensor:
    """The sum over a batch in float64, on the CPU.

    :raises FloatingPointError: a token of the text has probability zero; names the window
    """
    require_finite(losses, batch, "a token of the text has probability zero")
    return losses.double().sum().cpu()


def total_negative_log_likelihood(
    model: PreTrainedModel,
    documents: Sequence[Document],
    windows: Sequence[Window],
    batch_size: int = 1,
    description: str | None = None,
) -> float:
    """The sum of -log p(token | tokens before it in its window) over all predictions that count, in nats.

    The model runs block by block, see `predict_windows`. The softmax is taken in float32 and the sum kept in
    float64, whatever the dtype of the model. A batch takes ``batch_size`` * length * vocabulary logits.

    :param description: of the progress bar; None shows none
    :raises FloatingPointError: logits are NaN or infinite, or a token of the text has probability zero; names
        the window
    """
    grouped = batches(windows, batch_size)
    total, add = _total(grouped)
    predict_windows(model, documents, grouped, add, description)
    return total.item()


def _total(grouped: Sequence[Sequence[Window]]) -> tuple[Tensor, Callable[[int, Tensor, Tensor], None]]:
    """A sum in float64, and what adds a batch to it."""
    total = torch.zeros((), dtype=torch.float64)

    def add(index: int, logits: Tensor, targets: Tensor) -> None:
        total.add_(summed(window_losses(logits, targets), grouped[index]))

    return total, add


def mean_negative_log_likelihood(model: Module, token_ids: Tensor, batch_size: int = 8) -> float:
    """The mean of -log p(token | tokens before it in its sequence), in nats.

    :param model: a causal language model of transformers, called as ``model(input_ids=...)`` and read by
        ``.logits``; one that is opened or offloaded runs block by block, see `predict_windows`
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
    grouped = batches(whole, batch_size)
    total, add = _total(grouped)
    # A model in training is whatever its trainer made of it, and is only called.
    (predict_windows if is_offloaded(model) else _predict_whole)(model, documents, grouped, add)
    return total.item() / (sequences * targets)


def perplexity(model: Module, token_ids: Tensor, batch_size: int = 8) -> float:
    """exp of `mean_negative_log_likelihood` (same arguments, same errors)."""
    return perplexity_of(mean_negative_log_likelihood(model, token_ids, batch_size))


def perplexity_of(mean_nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where a float cannot hold it."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
