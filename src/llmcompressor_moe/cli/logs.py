"""What a command shows of the logs underneath it."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import datasets
from llmcompressor.logger import configure_logger
from loguru import logger
from transformers.utils import logging as transformers_logging

__all__ = ["logs"]


@contextlib.contextmanager
def logs(verbose: bool) -> Iterator[None]:
    """Show this package's warnings and everybody's errors; with ``verbose`` everything from INFO up."""
    logger.remove()
    logger.add(
        sys.stderr, level="INFO" if verbose else "WARNING", format=_line, filter=None if verbose else _matters
    )
    before = transformers_logging.get_verbosity()
    tensors = logging.getLogger("compressed_tensors")
    level = tensors.level
    bars = datasets.are_progress_bars_disabled()
    try:
        with warnings.catch_warnings():
            if not verbose:
                transformers_logging.set_verbosity_error()
                datasets.disable_progress_bars()
                tensors.setLevel(logging.ERROR)
                warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
        tensors.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
        configure_logger()


def _matters(record: Any) -> bool:
    return record["level"].no >= logger.level("ERROR").no or str(record["name"]).startswith(
        "llmcompressor_moe"
    )


def _line(record: Any) -> str:
    return "{level.name}: {message}\n"
