"""How well a model predicts given text: perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from llmcompressor_moe.evaluation.likelihood import perplexity_of, total_negative_log_likelihood
from llmcompressor_moe.evaluation.windows import Document, Texts, Window, choose_windows, tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TextQuality", "quality_of", "require_bytes", "text_quality"]


class TextQuality(BaseModel):
    """How well a model predicts text. Only the bits per byte compare models with different tokenizers.

    :param documents: texts, none of which sees another
    :param tokens: tokens predicted: all but the first of each document
    :param nbytes: UTF-8 bytes of the documents behind those first tokens (all bytes where that is a BOS)
    :param length: tokens per window, at most
    :param stride: tokens that each window after a document's first predicts
    :param mean_nll: mean of -log p(token | tokens before it in its window) over tokens, in nats
    :param perplexity: exp of ``mean_nll``
    :param bits_per_byte: sum of -log2 p over tokens, divided by ``nbytes``
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    documents: int
    tokens: int
    nbytes: int
    length: int
    stride: int
    mean_nll: float
    perplexity: float
    bits_per_byte: float


def text_quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    length: int | None = None,
    stride: int | None = None,
    *,
    batch_size: int = 1,
    running_text: bool = False,
) -> TextQuality:
    """Predict every token of every text once (but its first) and say how well that went.

    What a prediction sees is told in `windows.windows`: at least ``length - stride + 1`` tokens where its
    document has them before it. ``stride=length`` is the cheapest and overstates the perplexity, as the first
    tokens of a window see little; ``stride=1`` gives each token all ``length`` and takes a forward per token.

    Bits per byte as in The Pile (Gao et al., https://arxiv.org/abs/2101.00027, section 3.1): total nats / ln 2
    / UTF-8 bytes. The bytes of a first token that nothing predicts do not count.

    :param texts: one text, several, or rows of token ids, [rows, tokens] or of different lengths
    :param length: tokens per window; None for 2048, or the model's positions where those are fewer
    :param stride: tokens each further window predicts; None for half of ``length``
    :param batch_size: windows per forward; each takes length * vocabulary logits
    :param running_text: let all texts be one, each after an empty line, and see what came before
    :raises ValueError: a text has fewer than two tokens or nothing but special ones; ``length`` is more than
        the model has positions for; ``stride`` is more than ``length``; the tokenizer is another model's
    :raises FloatingPointError: logits are NaN or infinite; names the window
    """
    documents = tokenized(tokenizer, texts, running_text=running_text)
    length, stride, found = choose_windows(model.config, documents, length, stride)
    require_bytes(documents)
    total = total_negative_log_likelihood(model, documents, found, batch_size, "Perplexity")
    return quality_of(documents, found, length, stride, total)


def require_bytes(documents: Sequence[Document]) -> int:
    """UTF-8 bytes of documents.

    :raises ValueError: there are none
    """
    nbytes = sum(document.nbytes for document in documents)
    if nbytes < 1:
        raise ValueError("the texts hold nothing but special tokens, so there are no bytes; give text")
    return nbytes


def quality_of(
    documents: Sequence[Document], windows: Iterable[Window], length: int, stride: int, total: float
) -> TextQuality:
    """What a sum of negative log-likelihoods over windows says.

    :param total: in nats
    :raises ValueError: the documents have no bytes
    """
    nbytes = require_bytes(documents)
    tokens = sum(window.scored for window in windows)
    return TextQuality(
        documents=len(documents),
        tokens=tokens,
        nbytes=nbytes,
        length=length,
        stride=stride,
        mean_nll=total / tokens,
        perplexity=perplexity_of(total / tokens),
        bits_per_byte=total / math.log(2) / nbytes,
    )
