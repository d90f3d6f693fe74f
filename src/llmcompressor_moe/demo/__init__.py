"""A small Mixture-of-Experts language model with its calibration and held-out text, ready without a network.

    from llmcompressor_moe.demo import DEMO_MODEL, calibration_dataset

`DEMO_MODEL` is a directory that stock transformers and vLLM read: a Mixtral of 8 blocks with 8 experts each,
4 million parameters, bfloat16, made by `train.py` in this package from public-domain English
(`text/LICENSES.md`). The texts are passages of consecutive paragraphs, about 2,000 characters each, from
documents that the model was not trained on; a line is a paragraph and a blank line ends a passage, so that
`datasets.load_dataset("text", data_files=..., sample_by="paragraph")` reads them as well.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_HERE = Path(__file__).resolve().parent
DEMO_MODEL: Path = _HERE / "model"
DEMO_CALIBRATION: Path = _HERE / "text" / "calibration.txt"
DEMO_HELDOUT: Path = _HERE / "text" / "heldout.txt"


def calibration_texts() -> list[str]:
    """Return the calibration passages (some 100; 200,000 characters)."""
    return _passages(DEMO_CALIBRATION)


def heldout_texts() -> list[str]:
    """Return the passages that measurements are made on (some 60; 125,000 characters)."""
    return _passages(DEMO_HELDOUT)


def calibration_dataset(
    tokenizer: "PreTrainedTokenizerBase", num_samples: int = 64, sequence_length: int = 256
) -> "Dataset":
    """Return calibration samples for `oneshot(dataset=...)`: `input_ids` and `attention_mask`, no padding.

    Every sample has exactly `sequence_length` tokens. The samples are taken at equal distances from the whole
    text, so a small number of them still holds every kind of text. The order is fixed.

    Raises:
        ValueError: `num_samples` or `sequence_length` is not positive, or the text has fewer samples
            than asked for.
    """
    from datasets import Dataset

    rows = token_rows(tokenizer, calibration_texts(), sequence_length)
    if not 1 <= num_samples <= len(rows):
        raise ValueError(
            f"num_samples is {num_samples}; the calibration text has {len(rows)} samples of "
            f"{sequence_length} tokens: give 1 to {len(rows)}, or a shorter sequence_length"
        )
    chosen = [rows[index * len(rows) // num_samples] for index in range(num_samples)]
    return Dataset.from_dict({"input_ids": chosen, "attention_mask": [[1] * sequence_length] * num_samples})


def heldout_rows(tokenizer: "PreTrainedTokenizerBase", sequence_length: int = 256) -> list[list[int]]:
    """Return the held-out text as rows of `sequence_length` token ids, ready for `evaluation.perplexity`."""
    return token_rows(tokenizer, heldout_texts(), sequence_length)


def token_rows(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], sequence_length: int
) -> list[list[int]]:
    """Join the tokenized texts, each closed by EOS, and cut the result into rows of `sequence_length` ids.

    A tokenizer without an EOS token closes nothing. The tokens left over at the end are not used.

    Raises:
        ValueError: `sequence_length` is not positive.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}; give at least 1")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    tokens = [token for ids in encoded for token in (*ids, *end)]
    return [
        tokens[start : start + sequence_length]
        for start in range(0, len(tokens) - sequence_length + 1, sequence_length)
    ]


def _passages(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").strip().split("\n\n")
