"""Has loaders that go by the global expert count load each layer by its own.

vLLM's fused MoE loads an expert at a time, into layers of whatever count. A loader of stacked experts (gpt-oss)
reshapes them by the count in the config, and takes each rank's share from it.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from llmcompressor_moe_vllm.config_view import layer_view
from llmcompressor_moe_vllm.overrides import LayerOverride, Plan

if TYPE_CHECKING:
    import torch

# By these parameters of its methods vLLM hands a loader the experts of a rank.
_SHARE = ("ep_rank_start", "ep_rank_end")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class ExpertRank(NamedTuple):
    """One of the ranks that share the experts of every layer; the only one without expert parallelism."""

    index: int = 0
    ranks: int = 1

    def share(self, count: int) -> tuple[int, int]:
        """The first expert of a layer that this rank holds, and the first that it no longer does.

        As vLLM's fused MoE places them: contiguous, the first ranks holding one more where they do not divide.
        """
        each, left = divmod(count, self.ranks)
        start = self.index * each + min(self.index, left)
        return start, start + each + (self.index < left)


def load_by_layer(model: nn.Module, plan: Plan, global_count: int, rank: ExpertRank) -> None:
    """Let such loaders in `model` meet one layer's count at a time, and this rank's share of it.

    `global_count` is that of the layers that `plan` does not name.
    """
    for part in model.modules():
        if hasattr(part, "load_weights") and (methods := _methods_by_share(type(part))):
            _load_part_by_layer(part, methods, plan, global_count, rank)


def _methods_by_share(part: type[nn.Module]) -> list[str]:
    methods = inspect.getmembers(part, inspect.isfunction)
    return [name for name, method in methods if set(_SHARE) <= inspect.signature(method).parameters.keys()]


def _load_part_by_layer(
    part: nn.Module, methods: Iterable[str], plan: Plan, global_count: int, rank: ExpertRank
) -> None:
    share: dict[str, int] = {}
    for name in methods:
        setattr(part, name, _with_arguments(getattr(part, name), share))
    load_weights = part.load_weights

    @wraps(load_weights)
    def load(weights: "Iterable[tuple[str, torch.Tensor]]") -> set[str]:
        loaded: set[str] = set()
        for index, group in _by_layer(weights):
            override = plan.get(index, LayerOverride())
            share.update(zip(_SHARE, rank.share(override.num_experts or global_count), strict=True))
            with layer_view(override.values):
                loaded |= load_weights(group)
        return loaded

    part.load_weights = load


def _with_arguments(method: Callable[..., Any], arguments: dict[str, int]) -> Callable[..., Any]:
    """`method`, taking `arguments`, as they are when it is called, in place of what it is given."""
    signature = inspect.signature(method)

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.arguments.update(arguments)
        return method(*given.args, **given.kwargs)

    return call


def _by_layer(
    weights: "Iterable[tuple[str, torch.Tensor]]",
) -> "Iterator[tuple[int, Iterator[tuple[str, torch.Tensor]]]]":
    """Runs of weights of one layer, with its index; -1 for what belongs to none."""

    def layer_of(weight: "tuple[str, torch.Tensor]") -> int:
        found = _LAYER.search(weight[0])
        return int(found[1]) if found else -1

    return groupby(weights, layer_of)
