"""What is fed to a model and which of its predictions count: texts to token rows, token rows to windows.

The windows are those of lm-eval's rolling log-likelihood (`lm_eval.utils.get_rolling_token_windows`, Gao et
al., https://github.com/EleutherAI/lm-evaluation-harness), with a document's first token in the place of its
prefix token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "Document",
    "Window",
    "batches",
    "choose_windows",
    "position_limit",
    "tokenized",
    "vocabulary_size",
    "windows",
]

Texts = str | Sequence[str] | Sequence[Sequence[int]] | Tensor

# What quantization papers commonly evaluate with (GPTQ, https://arxiv.org/abs/2210.17323, and after it others).
_COMMON_LENGTH = 2048
# WikiText's own paragraphs are joined like this there.
_BETWEEN_DOCUMENTS = "\n\n"


@dataclass(frozen=True)
class Document:
    """One text that nothing outside of it can be seen from.

    :param token_ids: [tokens], int64, on the CPU
    :param nbytes: UTF-8 bytes of its text behind the first token, which nothing predicts
    """

    token_ids: Tensor
    nbytes: int


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` (exclusive) of a document in one forward; each predicts the token behind it.

    :param document: index of the document
    :param scored: how many of the predictions count, always the last ones; the others were made with less
        context by an earlier window or not at all
    """

    document: int
    begin: int
    end: int
    scored: int

    def __str__(self) -> str:
        return f"the window of tokens {self.begin} to {self.end} of document {self.document}"


def tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, *, running_text: bool = False
) -> list[Document]:
    """Documents as the tokenizer makes them, with the BOS (and EOS) that it adds by itself, if any.

    A BOS is the first token, so that every token of the text itself is predicted; without one the first token
    of the text is not. ``nbytes`` is the length of the whole text in UTF-8 less that of the decoded first
    token (nothing for a BOS). Token rows are decoded for it; a character that a row's border cuts in two
    counts as the three bytes of the replacement character.

    :param texts: one text, several, or rows of token ids (nothing is added to them)
    :param running_text: make one document of all: texts joined by an empty line, rows as they follow each other
    :raises ValueError: there is no text; a document has fewer than the two tokens that one prediction needs
        (names them and their lengths); an entry is neither text nor token ids
    """
    entries = (
        [texts] if isinstance(texts, str) else texts.tolist() if isinstance(texts, Tensor) else list(texts)
    )
    if not entries:
        raise ValueError("texts is empty; give at least one text")
    if all(isinstance(entry, str) for entry in entries):
        entries = [_BETWEEN_DOCUMENTS.join(entries)] if running_text else entries
        rows = tokenizer(entries, verbose=False)["input_ids"]
        spelled = entries
    else:
        rows = [_row(index, entry) for index, entry in enumerate(entries)]
        rows = [[token for row in rows for token in row]] if running_text else rows
        spelled = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    _refuse_short(rows)
    return [
        Document(
            torch.tensor(row), _nbytes(text) - _nbytes(tokenizer.decode(row[:1], skip_special_tokens=True))
        )
        for row, text in zip(rows, spelled, strict=True)
    ]


def _row(index: int, entry: object) -> list[int]:
    row = entry.tolist() if isinstance(entry, Tensor) else entry
    if (
        isinstance(row, Sequence)
        and not isinstance(row, str)
        and all(isinstance(token, int) for token in row)
    ):
        return list(row)
    raise ValueError(
        f"texts[{index}] is {type(entry).__name__} {str(entry)[:40]!r}; give only texts, or only rows of token ids"
    )


def _refuse_short(rows: Sequence[Sequence[int]]) -> None:
    short = {index: len(row) for index, row in enumerate(rows) if len(row) < 2}
    if short:
        listed = ", ".join(f"{index} ({length})" for index, length in list(short.items())[:8])
        raise ValueError(
            f"documents with fewer than the 2 tokens that one prediction needs, with their tokens: {listed}"
            f"{', ...' if len(short) > 8 else ''} ({len(short)} of {len(rows)} documents); leave them out, or "
            "join all documents with running_text=True"
        )


def _nbytes(text: str) -> int:
    return len(text.encode())


def windows(lengths: Sequence[int], length: int, stride: int) -> list[Window]:
    """Windows that predict every token of every document but its first exactly once.

    A document's first window predicts up to ``length`` tokens from up to ``length``; each further one predicts
    the next ``stride`` tokens (the last one what is left) from the ``length`` tokens before the last of them, so
    that each has at least ``length - stride + 1`` tokens of context.

    :param lengths: tokens per document
    :param length: tokens in one forward, at most
    :param stride: tokens that a further window predicts; the smaller, the more context and the more forwards
    :raises ValueError: ``length`` is below 1, or ``stride`` is not in 1 to ``length``
    """
    if length < 1:
        raise ValueError(f"length is {length}; give at least 1 token per window")
    if not 1 <= stride <= length:
        raise ValueError(
            f"stride is {stride} at length {length}; give 1 to {length}: above, tokens between two windows would "
            "not be predicted"
        )
    return [
        window
        for document, tokens in enumerate(lengths)
        for window in _of_one(document, tokens, length, stride)
    ]


def _of_one(document: int, tokens: int, length: int, stride: int) -> list[Window]:
    targets = tokens - 1
    first = min(length, targets)
    found = [Window(document, 0, first, first)]
    for done in range(first, targets, stride):
        end = min(done + stride, targets)
        found.append(Window(document, end - length, end, end - done))
    return found


def batches(windows: Sequence[Window], batch_size: int) -> list[list[Window]]:
    """Windows of equal shape together, so that no batch needs padding.

    :raises ValueError: ``batch_size`` is below 1
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    alike: dict[tuple[int, int], list[Window]] = {}
    for window in windows:
        alike.setdefault((window.end - window.begin, window.scored), []).append(window)
    return [
        group[start : start + batch_size]
        for group in alike.values()
        for start in range(0, len(group), batch_size)
    ]


def choose_windows(
    config: PreTrainedConfig, documents: Sequence[Document], length: int | None, stride: int | None
) -> tuple[int, int, list[Window]]:
    """Length, stride and windows for a model, having looked whether it can take them.

    :param config: the model's
    :param length: None for 2048, or what the model has positions for where that is less
    :param stride: None for half of ``length``
    :raises ValueError: the model has fewer positions than ``length``, or a token id is not in its vocabulary
    """
    limit = position_limit(config)
    if length is None:
        length = min(_COMMON_LENGTH, limit or _COMMON_LENGTH)
    stride = max(1, length // 2) if stride is None else stride
    found = windows([len(document.token_ids) for document in documents], length, stride)
    check_fits(config, documents, length)
    return length, stride, found


def check_fits(config: PreTrainedConfig, documents: Sequence[Document], length: int) -> None:
    """Refuse windows that a model cannot take.

    :raises ValueError: it has fewer positions than ``length``, or a token id is not in its vocabulary
    """
    limit = position_limit(config)
    if limit is not None and length > limit:
        raise ValueError(
            f"length is {length}, but the model has {limit} positions (max_position_embeddings); give at most that"
        )
    vocabulary = vocabulary_size(config)
    highest = max(int(document.token_ids.max()) for document in documents)
    if vocabulary is not None and highest >= vocabulary:
        raise ValueError(
            f"token id {highest} is not in the model's vocabulary of {vocabulary}; use the model's own tokenizer"
        )


def position_limit(config: PreTrainedConfig) -> int | None:
    """``max_position_embeddings`` of the text config; None where it has none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def vocabulary_size(config: PreTrainedConfig) -> int | None:
    """``vocab_size`` of the text config; None where it has none."""
    return getattr(config.get_text_config(), "vocab_size", None)
