"""Whether weight files hold what the config demands, for those who are going to load them."""

from __future__ import annotations

from pathlib import Path

from llmcompressor_moe.check.run import check_checkpoint
from llmcompressor_moe.checkpoint.layout import whole_layout

__all__ = ["require_weights"]

# What readers fill with random values, or stumble over. Other findings are about serving.
_NOT_LOADABLE = ("tensor-missing", "tensor-shape")


def require_weights(model: str | Path) -> None:
    """Look at the headers only.

    :param model: its directory, whose config can be read
    :raises ValueError: a file is missing or damaged, or a tensor is missing or has another shape; names the first
    """
    whole_layout(model)
    for finding in check_checkpoint(model).errors:
        if finding.code in _NOT_LOADABLE:
            raise ValueError(
                f"model {str(model)!r}: {finding.subject}: {finding.message}; {finding.way_out}."
            )
