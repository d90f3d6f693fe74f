"""Calibration samples from a text file, JSON lines, a saved or named dataset, or the bundled text."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompressor_moe.demo import calibration_texts, token_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEMO", "CalibrationDataError", "calibration_samples", "documents", "tokenized_rows"]

DEMO = "demo"
_TEXT, _IDS = "text", "input_ids"
# Documents taken from a dataset that is fetched, per sample that is wanted.
_DOCUMENTS_PER_SAMPLE = 64


class CalibrationDataError(ValueError):
    """The calibration data cannot be used."""


def calibration_samples(
    dataset: str | Path, tokenizer: PreTrainedTokenizerBase, num_samples: int, sequence_length: int
) -> Dataset:
    """Tokenized samples for `oneshot(dataset=...)`: ``input_ids`` and ``attention_mask``, no padding.

    Documents are joined, each closed by EOS, and cut into samples of ``sequence_length`` tokens;
    ``num_samples`` of them are taken at equal distances (all, where there are fewer), so that the same call
    gives the same samples. A dataset that is tokenized already (``input_ids``) is only cut to length.

    :param dataset: ``demo`` (the bundled text); a ``.txt`` file, a blank line between documents; a ``.jsonl``
        file whose lines have ``text``; a directory written by ``datasets.save_to_disk``; or the name of a
        dataset, ``name`` or ``name:split``
    :raises CalibrationDataError: it is not there, has no text, or less than one sample
    """
    from datasets import Dataset

    source = str(dataset)
    rows = tokenized_rows(source, sequence_length)
    if rows is None:
        rows = token_rows(tokenizer, documents(source, num_samples), sequence_length)
    if not rows:
        raise CalibrationDataError(
            f"dataset {source!r} holds less than one sample of {sequence_length} tokens; give more text or a "
            "lower sequence length."
        )
    count = min(num_samples, len(rows))
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    return Dataset.from_dict({_IDS: chosen, "attention_mask": [[1] * len(row) for row in chosen]})


def documents(source: str, num_samples: int) -> list[str]:
    """Texts from a source; see `calibration_samples`.

    :param num_samples: how much is taken of a dataset that is fetched
    :raises CalibrationDataError: it is not there, or has no text
    """
    if source == DEMO:
        return calibration_texts()
    path = Path(source)
    if path.suffix == ".txt":
        blocks = _read(path).replace("\r\n", "\n").split("\n\n")
        documents = [block.strip() for block in blocks if block.strip()]
    elif path.suffix == ".jsonl":
        documents = [_text_of(line, number, path) for number, line in _lines(path)]
    elif path.is_dir():
        documents = _column(_from_disk(path), source)
    elif path.exists():
        raise CalibrationDataError(f"dataset {source!r}: unknown kind of file; give .txt or .jsonl.")
    else:
        documents = _fetched(source, num_samples)
    if not documents:
        raise CalibrationDataError(f"dataset {source!r} is empty; give at least one document.")
    return documents


def _read(path: Path) -> str:
    try:
        # Without the mark that some editors begin a file with, which is no text.
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CalibrationDataError(
            f"dataset {str(path)!r} cannot be read ({error.strerror}); name a file that is there."
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationDataError(
            f"dataset {str(path)!r} cannot be read ({error}); save it as UTF-8."
        ) from error


def _lines(path: Path) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(_read(path).split("\n"), start=1) if line.strip()]


def _text_of(line: str, number: int, path: Path) -> str:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationDataError(f"dataset {str(path)!r}, line {number}: no JSON ({error.msg}).") from error
    text = document.get(_TEXT) if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise CalibrationDataError(f'dataset {str(path)!r}, line {number}: no "{_TEXT}" with a string.')
    return text


def _from_disk(path: Path) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:
        raise CalibrationDataError(
            f"dataset {str(path)!r} cannot be read ({error}); give a directory written by "
            "datasets.save_to_disk."
        ) from error
    if isinstance(loaded, DatasetDict):
        return loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return loaded


def tokenized_rows(source: str, sequence_length: int) -> list[list[int]] | None:
    """Rows of a saved dataset that is tokenized already, cut to a length; None for everything else.

    :raises CalibrationDataError: the directory holds no dataset
    """
    if source == DEMO or not Path(source).is_dir():
        return None
    dataset = _from_disk(Path(source))
    if _IDS not in dataset.column_names:
        return None
    return [row[:sequence_length] for row in dataset[_IDS] if row]


def _column(dataset: Dataset, source: str) -> list[str]:
    if _TEXT not in dataset.column_names:
        raise CalibrationDataError(
            f"dataset {source!r} has the columns {dataset.column_names}; one must be {_TEXT!r} or {_IDS!r}."
        )
    return [text for text in dataset[_TEXT] if text]


def _fetched(source: str, num_samples: int) -> list[str]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        stream = load_dataset(name, split=split or "train", streaming=True)
        rows = list(islice(stream, num_samples * _DOCUMENTS_PER_SAMPLE))
    except Exception as error:
        raise CalibrationDataError(
            f"dataset {source!r} is not a file and cannot be fetched ({type(error).__name__}: {error}); give a "
            ".txt or .jsonl file, a "
            f"directory written by datasets.save_to_disk, or {DEMO!r}."
        ) from error
    if rows and _TEXT not in rows[0]:
        raise CalibrationDataError(
            f"dataset {source!r} has the columns {sorted(rows[0])}; one must be {_TEXT!r}."
        )
    return [row[_TEXT] for row in rows if row[_TEXT]]
