"""Puts a wrapper in the place of a function, also where it was imported by name before."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MARK = "__llmcompressor_moe_wraps__"


def wrap_everywhere(home: ModuleType | type, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace `home.name` by `wrapper(home.name)`, once, there and in every module that imported it."""
    original = getattr(home, name)
    if hasattr(original, _MARK):
        return
    wrapped = wrapper(original)
    setattr(wrapped, _MARK, original)
    setattr(home, name, wrapped)
    for module in list(sys.modules.values()):
        if _namespace(module).get(name) is original:
            setattr(module, name, wrapped)


def _namespace(module: Any) -> dict[str, Any]:
    # Some entries of sys.modules are proxies that import on attribute access.
    return module.__dict__ if isinstance(module, ModuleType) else {}
