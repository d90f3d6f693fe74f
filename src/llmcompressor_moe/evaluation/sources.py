"""Where the text that models are measured on comes from."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from llmcompressor_moe.calibration import DEMO, documents
from llmcompressor_moe.demo import heldout_texts

__all__ = ["evaluation_texts"]


def evaluation_texts(source: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[str]:
    """Documents up to a number of tokens: those at equal distances, so that few still show every kind of text.

    :param source: ``demo`` (the bundled held-out text), or see `calibration.documents`
    :return: at least one document; those of less than two tokens, which predict nothing, are left out
    :raises CalibrationDataError: there is no such source, or no text in it
    """
    every = heldout_texts() if source == DEMO else documents(source, max_tokens)
    lengths = [len(ids) for ids in tokenizer(every, verbose=False)["input_ids"]]
    usable = [index for index, length in enumerate(lengths) if length > 1]
    if not usable:
        raise ValueError(f"text {source!r} holds no document of at least two tokens; give more text.")
    total = sum(lengths[index] for index in usable)
    count = max(1, min(len(usable), len(usable) * max_tokens // total))
    return [every[usable[index * len(usable) // count]] for index in range(count)]
