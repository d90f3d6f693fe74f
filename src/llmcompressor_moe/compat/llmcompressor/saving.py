"""How llm-compressor wraps ``save_pretrained``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["mark_wrapped"]


def mark_wrapped(save_pretrained: Callable[..., Any]) -> None:
    """Keep llm-compressor from wrapping a ``save_pretrained`` that calls its own.

    It looks for this mark, and would compress the weights a second time.
    """
    save_pretrained._overridden = True
