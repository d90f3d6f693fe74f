"""Take a block or an MoE layer out of the computation while its modules stay in place.

While a recipe runs, other modifiers hold names and references of modules that existed when they were
initialized. A part that is dropped is therefore bypassed at once, and removed when the recipe ends
(`compact`).
"""

from __future__ import annotations

import ast
import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from llmcompressor_moe.surgery.skipped import SkippedMoE, returned_expression

__all__ = [
    "bypass_block",
    "bypass_moe",
    "bypassed",
    "is_bypassed",
    "num_outputs",
    "pass_through",
    "replace_hidden",
    "silence",
]

_MARK = "_bypassed_by_trim"


def bypass_block(block: nn.Module) -> None:
    """From now on the block hands its input on."""
    _replace_forward(block, pass_through(block))
    setattr(block, _MARK, True)


def bypass_moe(moe: nn.Module) -> None:
    """From now on the MoE layer, shared experts included, adds nothing to the residual stream."""
    _replace_forward(moe, silence(moe))
    setattr(moe, _MARK, True)


def is_bypassed(module: nn.Module) -> bool:
    """Whether the module was bypassed for good."""
    return getattr(module, _MARK, False)


@contextlib.contextmanager
def bypassed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward for the time of the context."""
    own = module.__dict__.get("forward")
    _replace_forward(module, forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    # Offloading wraps a module's forward and expects a bound method there.
    module.forward = types.MethodType(lambda _self, *args, **kwargs: forward(*args, **kwargs), module)


def pass_through(block: nn.Module) -> Callable[..., Any]:
    """A forward for a block that returns its hidden states unchanged, in its own return convention."""
    outputs = num_outputs(type(block))

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if outputs == 1 else (hidden, *[None] * (outputs - 1))

    return forward


def silence(moe: nn.Module) -> Callable[..., Any]:
    """A forward for an MoE layer that returns zeros, in the layer's own return convention."""
    return SkippedMoE.for_module(moe).forward


def replace_hidden(output: Any, hidden_states: torch.Tensor) -> Any:
    """A block's output with other hidden states in it."""
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def num_outputs(module_cls: type[nn.Module]) -> int:
    """How many values a module class returns: 1, or the length of the tuple that its forward ends with."""
    last = returned_expression(module_cls)
    return len(last.elts) if isinstance(last, ast.Tuple) else 1
