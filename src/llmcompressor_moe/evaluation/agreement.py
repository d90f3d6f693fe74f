"""How much a compressed model says the same as its base model, token by token.

The two need never be in memory together, nor the logits of either: the base's are written to a file first, and
read window by window while the compressed model answers the same windows. One recording serves any number of
compressed models. Each model runs block by block, so neither has to fit in memory.

The file takes tokens * vocabulary * bytes per logit: 2 in bfloat16, 4 where 16-bit models are computed in float32,
as on most CPUs. 16,384 tokens with Mixtral's vocabulary of 32,000 take 1.0 or 2.0 GiB, with Qwen3's of 151,936 4.6
or 9.3 GiB.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llmcompressor_moe.evaluation.likelihood import (
    predict_windows,
    require_finite,
    summed,
    window_losses,
)
from llmcompressor_moe.evaluation.text import TextQuality, quality_of
from llmcompressor_moe.evaluation.windows import (
    Document,
    Texts,
    Window,
    batches,
    check_fits,
    choose_windows,
    tokenized,
    vocabulary_size,
)
from llmcompressor_moe.profile.divergence import kl_divergence
from llmcompressor_moe.sizes import bytes_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Agreement",
    "BaseLogits",
    "agreement",
    "answers",
    "recorded_base",
    "require_same_vocabulary",
    "text_quality_of",
]


class Agreement(BaseModel):
    """How much a model says the same as its base. KL is KL(base || model) of the next token, in nats.

    :param tokens: predictions compared
    :param vocabulary: tokens that each is a distribution over
    :param length: tokens per window, at most
    :param stride: tokens that each window after a document's first predicts
    :param mean_kl: mean over predictions
    :param median_kl: half of the predictions have less; quantiles interpolate between neighbours
    :param kl_90: 90 % of the predictions have less
    :param kl_99: 99 % of the predictions have less
    :param top1_agreement: share of predictions whose most probable token is the base's
    """

    model_config = ConfigDict(extra="forbid")

    tokens: int
    vocabulary: int
    length: int
    stride: int
    mean_kl: float
    median_kl: float
    kl_90: float
    kl_99: float
    top1_agreement: float


@dataclass(frozen=True)
class BaseLogits:
    """A base model's logits on windows of text.

    :param batches: windows as they were fed, of equal shape within a batch
    :param values: [predictions in the order of ``batches``, vocabulary] in the dtype that the model was computed
        in, mapped from a file
    :param losses: what the text's own tokens cost the model in nats, [windows, scored] for each batch, fp32
    """

    documents: list[Document]
    batches: list[list[Window]]
    length: int
    stride: int
    values: Tensor
    losses: list[Tensor]


@contextlib.contextmanager
def recorded_base(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    length: int | None = None,
    stride: int | None = None,
    *,
    batch_size: int = 1,
    running_text: bool = False,
    directory: str | Path | None = None,
) -> Iterator[BaseLogits]:
    """Run the base model on texts and keep its logits in a temporary file while the context is open.

    They keep the dtype that they are computed in, so nothing is lost. The model is not needed afterwards.

    Example::

        with recorded_base(base, tokenizer, texts) as recording:
            del base
            result = agreement(recording, load_compressed())

    :param texts: as `text.text_quality` takes them, and so are ``length``, ``stride``, ``batch_size`` and
        ``running_text``
    :param directory: where the file goes; None for the system's temporary directory
    :raises ValueError: as `text.text_quality` does; ``directory`` is not a folder or has no room for
        the file (names its size)
    :raises FloatingPointError: logits are NaN or infinite; names the window
    """
    if directory is not None and not Path(directory).is_dir():
        raise ValueError(
            f"directory is {str(directory)!r}, which is not a folder; name one with room for the logits"
        )
    documents = tokenized(tokenizer, texts, running_text=running_text)
    length, stride, found = choose_windows(base.config, documents, length, stride)
    grouped = batches(found, batch_size)
    rows = sum(window.scored for window in found)
    with tempfile.TemporaryDirectory(prefix="base-logits-", dir=directory) as folder:
        kept = _Kept(Path(folder, "logits"), rows)
        predict_windows(base, documents, grouped, kept.take, "Base model")
        # The model is not needed any more, and a caller's `del` alone would not free it.
        del base
        yield BaseLogits(documents, grouped, length, stride, kept.values, kept.losses)


class _Kept:
    """Logits in a file, and losses, of batches in order.

    :ivar values: see `BaseLogits`, and so ``losses``
    """

    values: Tensor

    def __init__(self, path: Path, rows: int) -> None:
        self._path, self._rows, self._done = path, rows, 0
        self.losses: list[Tensor] = []

    def take(self, _: int, logits: Tensor, targets: Tensor) -> None:
        self.losses.append(window_losses(logits, targets).cpu())
        flat = logits.flatten(0, 1)
        if not self._done:
            self.values = _mapped(self._path, (self._rows, flat.shape[1]), flat.dtype)
        self.values[self._done : self._done + len(flat)] = flat.cpu()
        self._done += len(flat)


def text_quality_of(recording: BaseLogits, losses: Sequence[Tensor]) -> TextQuality:
    """How well a model predicts the text that was recorded.

    :param losses: `BaseLogits.losses`, or what `answers` gives of another model
    :raises ValueError: the text has no bytes
    :raises FloatingPointError: a token of it has probability zero; names the window
    """
    pairs = zip(losses, recording.batches, strict=True)
    total = sum((summed(of_batch, batch) for of_batch, batch in pairs), torch.zeros((), dtype=torch.float64))
    windows = [window for batch in recording.batches for window in batch]
    return quality_of(recording.documents, windows, recording.length, recording.stride, total.item())


def agreement(recording: BaseLogits, model: PreTrainedModel) -> Agreement:
    """Let a model answer the windows that its base answered, and compare the distributions; see `answers`."""
    return answers(recording, model)[0]


def answers(recording: BaseLogits, model: PreTrainedModel) -> tuple[Agreement, list[Tensor]]:
    """Let a model answer the windows that its base answered, and compare the distributions.

    Softmax and sums are taken in float64 from the logits as the models give them, a few tokens at a time.

    :return: the comparison, and the losses as `BaseLogits.losses`
    :raises ValueError: the vocabularies differ in size, or the model has fewer positions than the windows
    :raises FloatingPointError: logits are NaN or infinite, or a token that the base may say has probability
        zero; names the window
    """
    vocabulary = recording.values.shape[1]
    require_same_vocabulary(vocabulary, vocabulary_size(model.config))
    check_fits(model.config, recording.documents, recording.length)
    divergences: list[Tensor] = []
    losses: list[Tensor] = []
    same: list[Tensor] = []

    def compare(index: int, logits: Tensor, targets: Tensor) -> None:
        losses.append(window_losses(logits, targets).cpu())
        flat = logits.flatten(0, 1)
        require_same_vocabulary(vocabulary, flat.shape[1])
        done = sum(map(len, divergences))
        base = recording.values[done : done + len(flat)].to(flat.device)
        apart = kl_divergence(base, flat)
        require_finite(
            apart.view(targets.shape),
            recording.batches[index],
            "the KL divergence from the base model is infinite",
        )
        divergences.append(apart.cpu())
        same.append((base.argmax(-1) == flat.argmax(-1)).cpu())

    predict_windows(model, recording.documents, recording.batches, compare, "Agreement")
    every = torch.cat(divergences)
    median, high, highest = torch.quantile(every, torch.tensor([0.5, 0.9, 0.99], dtype=every.dtype)).tolist()
    found = Agreement(
        tokens=len(every),
        vocabulary=vocabulary,
        length=recording.length,
        stride=recording.stride,
        mean_kl=every.mean().item(),
        median_kl=median,
        kl_90=high,
        kl_99=highest,
        top1_agreement=int(torch.cat(same).sum()) / len(every),
    )
    return found, losses


def _mapped(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    count = shape[0] * shape[1]
    nbytes = count * dtype.itemsize
    try:
        with path.open("wb") as file:
            # Reserved, not only sized: a full disk would kill the process while it writes to the mapping.
            os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        raise ValueError(
            f"the base model's logits ({shape[0]} tokens, vocabulary of {shape[1]}) take {bytes_text(nbytes)}, "
            f"for which {str(path.parent.parent)!r} has no room ({error.strerror}); name another directory or "
            "give fewer texts"
        ) from error
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)


def require_same_vocabulary(base: int | None, other: int | None) -> None:
    """Refuse to compare distributions over different vocabularies; None is unknown.

    :raises ValueError: they differ in size
    """
    if None not in (base, other) and base != other:
        raise ValueError(
            f"the base model has a vocabulary of {base} tokens, the other model one of {other}; compare a model "
            "with the one that it was made from"
        )
