"""The module that stands where an MoE layer was dropped."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
from torch import nn

__all__ = ["SkippedMoE", "returned_expression", "returns_pair", "state_argument"]


class SkippedMoE(nn.Module):
    """Returns zeros in place of an MoE layer that is gone: nothing is added to the residual stream.

    It has no parameters, so a checkpoint holds none for it. Where the MoE layer returned a pair, so does
    this; where the pair's second value is a state that the family hands from one MoE layer to the next, that
    state goes through unchanged.

    :param pair: return ``(zeros, second)`` instead of ``zeros``
    :param state: name and position, among the arguments after the hidden states, of the state that is
        handed on as ``second``; without one ``second`` is None
    """

    def __init__(self, pair: bool = False, state: tuple[str, int] | None = None):
        super().__init__()
        self.pair = pair
        self.state = state

    @classmethod
    def for_module(cls, moe: nn.Module, block: nn.Module | None = None) -> SkippedMoE:
        """The stand-in for one MoE layer, in that layer's return convention.

        :param moe: the MoE layer (router, experts and shared experts)
        :param block: the block in which the stand-in will take the layer's place. Give it whenever the module
            itself is replaced: a block that asks for its MoE by class takes anything else for a dense
            feed-forward, and expects that one's plain return value.
        """
        if block is not None and _asks_for_class(type(block)):
            return cls()
        return cls(returns_pair(type(moe)), state_argument(type(moe)))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros like ``hidden_states`` (any shape), alone or as the first of a pair."""
        zeros = torch.zeros_like(hidden_states)
        return (zeros, self._second(args, kwargs)) if self.pair else zeros

    def _second(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.state is None:
            return None
        name, position = self.state
        return kwargs.get(name, args[position] if position < len(args) else None)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return "pair" if self.pair else ""


def returns_pair(moe_cls: type[nn.Module]) -> bool:
    """Whether an MoE layer's forward returns ``(hidden_states, something)``, read from its source."""
    return isinstance(returned_expression(moe_cls), ast.Tuple)


def state_argument(moe_cls: type[nn.Module]) -> tuple[str, int] | None:
    """Name and position (after the hidden states) of an argument that is an MoE layer's second return value.

    Such a value is a state that the next MoE layer takes up, as ZAYA's routers do; scores that are merely
    reported are no argument of the forward.
    """
    returned = returned_expression(moe_cls)
    if not isinstance(returned, ast.Tuple) or not isinstance(returned.elts[1], ast.Name):
        return None
    arguments = list(inspect.signature(moe_cls.forward).parameters)[2:]
    name = returned.elts[1].id
    return (name, arguments.index(name)) if name in arguments else None


def returned_expression(module_cls: type[nn.Module]) -> ast.expr | None:
    """What the last ``return`` of a module's forward returns."""
    values = [node.value for node in ast.walk(_forward(module_cls)) if isinstance(node, ast.Return)]
    return values[-1] if values else None


@functools.cache
def _forward(module_cls: type[nn.Module]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(module_cls.forward))))


@functools.cache
def _asks_for_class(block_cls: type[nn.Module]) -> bool:
    """Whether a block's forward looks at the class of one of its children."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and isinstance(node.args[0], ast.Attribute)
        and isinstance(node.args[0].value, ast.Name)
        and node.args[0].value.id == "self"
        for node in ast.walk(_forward(block_cls))
    )
