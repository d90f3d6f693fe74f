"""How a model is run over calibration data: chosen once, at the outside, and valid for every pass inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

__all__ = ["RunOptions", "current_options", "run_options"]


@dataclass(frozen=True)
class RunOptions:
    """Options of passes over calibration data.

    :param compute_dtype: dtype that 16-bit weights are computed in; None: see `computing.fast_dtype`
    :param max_memory: bytes that hidden states may take while they wait between blocks, the rest waits in files;
        None: half of the memory that is available when a pass starts
    :param scratch: directory of these files; None: the system's directory for temporary files
    :param wave_tokens: tokens that are inside one block at a time, whole batches and at least one; None: so many
        that they fill a quarter of the available memory at most
    """

    compute_dtype: torch.dtype | None = None
    max_memory: int | None = None
    scratch: Path | None = None
    wave_tokens: int | None = None


_CURRENT: ContextVar[RunOptions] = ContextVar("run_options", default=RunOptions())  # noqa: B039 (frozen)


def current_options() -> RunOptions:
    """The options of passes that start now."""
    return _CURRENT.get()


@contextlib.contextmanager
def run_options(**changes: Any) -> Iterator[RunOptions]:
    """Change options for all passes inside the context.

    :param changes: fields of `RunOptions`
    :raises TypeError: a name is not one of its fields
    """
    token = _CURRENT.set(replace(_CURRENT.get(), **changes))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)
