"""What recovery trains and measures on: text as rows of one length, and the order in which rows come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llmcompressor_moe.calibration import DEMO, documents, tokenized_rows
from llmcompressor_moe.demo import token_rows
from llmcompressor_moe.evaluation.sources import evaluation_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RecoveryRows", "RowStream", "recovery_rows", "rows_digest"]

# Cut out of a saved dataset whose rows are token ids: longer than any row, so that nothing is lost.
_UNCUT = 1 << 40


@dataclass(frozen=True)
class RecoveryRows:
    """Token ids, all rows full: nothing is padded, so every row weighs the same in every mean.

    :param train: [rows, length], int64
    :param heldout: [rows, length], int64; no text of it is trained on
    """

    train: Tensor
    heldout: Tensor


class RowStream(Dataset):
    """Training rows in the order they are taken: all of them, shuffled, then all of them shuffled anew.

    The order depends on the seed alone, not on ranks, batches or where training was interrupted. The n-th batch of
    a run is simply the n-th stretch of the stream.

    :param rows: [rows, length] token ids
    :param samples: how many rows are taken in all
    :param seed: of the order
    """

    def __init__(self, rows: Tensor, samples: int, seed: int) -> None:
        self._rows, self._samples, self._seed = rows, samples, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self._rows))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._rows), generator=generator)
        row = self._order[place]
        return {"input_ids": self._rows[row], "labels": self._rows[row], "row": row}


def recovery_rows(
    source: str,
    heldout: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    wanted_rows: int,
    heldout_share: float,
    max_heldout_tokens: int,
) -> RecoveryRows:
    """Read text and cut it into rows; see `calibration.calibration_samples` for sources.

    Documents are joined, each closed by EOS. Without a source for held-out rows, documents at equal distances are
    kept apart, of a single document its end; beside the bundled text it is the bundled held-out text.

    :param heldout: a source of its own; None: see above
    :param length: tokens per row
    :param wanted_rows: how much is taken of a dataset that is fetched
    :param heldout_share: share of the documents that is kept apart
    :param max_heldout_tokens: held-out rows are taken up to so many tokens, at least one row
    :raises ValueError: a source is not there, or holds less than one row
    """
    units = _units(source, tokenizer, length, wanted_rows)
    if heldout is None and source == DEMO:
        heldout = DEMO
    if heldout is not None:
        train = _packed(units, length)
        held = _packed_texts(evaluation_texts(heldout, tokenizer, max_heldout_tokens), tokenizer, length)
        if not len(held):
            raise ValueError(
                f"heldout={heldout!r} holds less than one row of {length} tokens; give more text or a lower "
                "length."
            )
    else:
        train, held = _split(units, length, heldout_share)
    if not len(train) or not len(held):
        raise ValueError(
            f"data={source!r} holds {sum(map(len, units))} tokens, too few for one row of {length} to train on "
            "and one to measure on; give more text or a lower length."
        )
    return RecoveryRows(train, held[: max(1, max_heldout_tokens // length)])


def rows_digest(rows: Tensor) -> str:
    """sha256 of token ids and their shape."""
    return hashlib.sha256(f"{tuple(rows.shape)}".encode() + rows.numpy().tobytes()).hexdigest()


def _units(
    source: str, tokenizer: PreTrainedTokenizerBase, length: int, wanted_rows: int
) -> list[Sequence[int]]:
    """Token ids of each document, with its end."""
    rows = tokenized_rows(source, _UNCUT)
    if rows is not None:
        return rows
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = documents(source, wanted_rows)
    return [[*ids, *end] for ids in tokenizer(texts, verbose=False)["input_ids"]]


def _packed(units: Sequence[Sequence[int]], length: int) -> Tensor:
    tokens = torch.tensor([token for unit in units for token in unit], dtype=torch.long)
    return tokens[: len(tokens) // length * length].view(-1, length)


def _packed_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    return torch.tensor(token_rows(tokenizer, texts, length), dtype=torch.long).view(-1, length)


def _split(units: Sequence[Sequence[int]], length: int, share: float) -> tuple[Tensor, Tensor]:
    apart = max(1, round(share * len(units)))
    chosen = {place * len(units) // apart for place in range(apart)}
    held = _packed([unit for index, unit in enumerate(units) if index in chosen], length)
    train = _packed([unit for index, unit in enumerate(units) if index not in chosen], length)
    if len(held) and len(train):
        return train, held
    rows = _packed(units, length)
    apart = max(1, round(share * len(rows)))
    return rows[:-apart], rows[-apart:]
