"""lm-eval: reading a task's definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["HOLDS_FOR", "yaml_loader"]

HOLDS_FOR = "lm-eval>=0.4.9,<0.5"


def yaml_loader() -> Callable[..., Any]:
    """The function by which lm-eval reads a task's YAML file, with its includes and functions.

    There is no public one, and the file cannot be read without what it includes.

    :raises ImportError: lm-eval is not installed
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml
