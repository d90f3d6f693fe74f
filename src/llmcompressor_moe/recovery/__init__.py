"""Win back what trimming and quantization cost: finetuning and distillation from the base model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmcompressor_moe.recovery.run import RecoveryReport, recover
    from llmcompressor_moe.recovery.settings import RecoverySettings

__all__ = ["RecoveryReport", "RecoverySettings", "recover"]

# Where each is: training needs packages that take long to import, and that not everybody installs.
_HOMES = {"RecoveryReport": "run", "RecoverySettings": "settings", "recover": "run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
