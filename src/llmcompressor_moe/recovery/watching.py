"""Collect what happens inside a model while it runs, with gradients where the model has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmcompressor_moe.compat.transformers.models import checkpointing_function
from llmcompressor_moe.profile.observing import first_tensor
from llmcompressor_moe.recovery.adapters import inner_model, student_topology
from llmcompressor_moe.recovery.scores import RouterScores
from llmcompressor_moe.topology import MoELayer

__all__ = ["Seen", "Watcher"]


@dataclass
class Seen:
    """What one forward showed, by block index.

    :param router_logits: [tokens, experts] in fp32, the softmax of which are the router's probabilities
    :param expert_outputs: what the MoE layer adds to the residual stream, shared experts included; the routed
        experts alone where the family keeps router and experts directly in the block
    :param hidden: what the block returns
    """

    router_logits: dict[int, torch.Tensor] = field(default_factory=dict)
    expert_outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)


class Watcher:
    """Hooks for one model, fused experts or one module per expert, wrapped or not.

    :param model: a transformers model, also inside of the wrappers of peft, accelerate and torch
    :param routers: blocks whose router is watched
    :param expert_outputs: blocks whose MoE layer is
    :param hidden: blocks whose output is
    :raises ValueError: a block is not there, or has no MoE layer or no router
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        routers: Collection[int] = (),
        expert_outputs: Collection[int] = (),
        hidden: Collection[int] = (),
    ) -> None:
        self.model = inner_model(model)
        blocks = (
            {block.index: block for block in student_topology(self.model).blocks}
            if any((routers, expert_outputs, hidden))
            else {}
        )
        missing = sorted({*routers, *expert_outputs, *hidden} - set(blocks))
        if missing:
            raise ValueError(
                f"{type(self.model).__name__} has {len(blocks)} blocks; there is no block {missing}."
            )
        self._hidden = {index: blocks[index].name for index in hidden}
        self._layers = {index: _layer(blocks[index].moe, index) for index in {*routers, *expert_outputs}}
        self._expert_outputs = {
            index: moe.experts if moe.inline else moe.module
            for index, moe in self._layers.items()
            if index in expert_outputs
        }
        self._routers = {index: _router(self._layers[index], index) for index in routers}
        self._scores = {
            index: RouterScores(
                self.model.get_submodule(path),
                self._layers[index].num_experts,
                f"block {index} ({path})",
                self.model.config,
            )
            for index, path in self._routers.items()
        }

    @property
    def top_k(self) -> dict[int, int]:
        """Block index -> experts that a token is routed to, of every block whose MoE layer is watched."""
        return {index: moe.top_k for index, moe in self._layers.items()}

    @contextlib.contextmanager
    def watching(self) -> Iterator[Seen]:
        """Watch the forward inside the context, the last one if there are several; `Seen` is filled as it ends.

        :raises ValueError: a block that is watched did not run, or a router does not tell its scores
        """
        seen = Seen()
        if not any((self._routers, self._expert_outputs, self._hidden)):
            yield seen
            return
        self._refuse_reentrant()
        # Nothing is computed in a hook: under gradient checkpointing a block runs again when the hooks are gone,
        # and has to save the same tensors.
        raw: dict[str, dict[int, Any]] = {"router": {}, "experts": {}, "hidden": {}}
        watched = {"router": self._routers, "experts": self._expert_outputs, "hidden": self._hidden}
        with contextlib.ExitStack() as stack:
            for kind, paths in watched.items():
                for index, path in paths.items():
                    module = self.model.get_submodule(path)
                    handle = module.register_forward_hook(_keep_in(raw[kind], index))
                    stack.callback(handle.remove)
            yield seen
        for kind, paths in watched.items():
            absent = sorted(set(paths) - set(raw[kind]))
            if absent:
                raise ValueError(
                    f"Of blocks {absent} the {kind} part ({paths[absent[0]]}) did not run, so it cannot be "
                    "compared."
                )
        seen.router_logits = {
            index: self._scores[index].read(output) for index, output in raw["router"].items()
        }
        seen.expert_outputs = {index: first_tensor(output) for index, output in raw["experts"].items()}
        seen.hidden = {index: first_tensor(output) for index, output in raw["hidden"].items()}

    def _refuse_reentrant(self) -> None:
        if not (torch.is_grad_enabled() and self.model.training):
            return
        for module in self.model.modules():
            function = checkpointing_function(module)
            if getattr(module, "gradient_checkpointing", False) and _is_reentrant(function):
                raise ValueError(
                    "gradient_checkpointing_kwargs has use_reentrant=True, under which nothing inside a block has "
                    "a gradient: router_kl, expert_output, hidden and load_balancing would train nothing. Give "
                    "use_reentrant=False."
                )


def _keep_in(store: dict[int, Any], index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        store[index] = output

    return hook


def _is_reentrant(function: Any) -> bool:
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))


def _layer(moe: MoELayer | None, index: int) -> MoELayer:
    if moe is None:
        raise ValueError(
            f"Block {index} has no MoE layer: router_kl, expert_output and load_balancing need one; give them the "
            "weight 0."
        )
    return moe


def _router(moe: MoELayer, index: int) -> str:
    if moe.router is None:
        raise ValueError(
            f"The router of block {index} was not found in {moe.module}: router_kl and load_balancing need it; "
            "give both the weight 0."
        )
    return moe.router
