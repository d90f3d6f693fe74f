"""What a router's probabilities are the softmax of, whatever function it scores experts with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llmcompressor_moe.profile.routers import probabilities, router_logits

__all__ = ["RouterScores"]

_SMALLEST = 1e-30


class RouterScores:
    """Reads one router's output as logits whose softmax over any of the experts is its distribution over them.

    A softmax router's logits are such. One that scores experts with a function of their logits, a sigmoid in
    DeepSeek-V3, weighs an expert by its share of the scores of those that are chosen; so its distribution is the
    normalised scores (DeepSeek-V3, https://arxiv.org/abs/2412.19437, equation 19), and their logarithms are the
    logits wanted. Corrections that are added for the choice alone, and limits to groups, are not part of it.

    :param router: the module, with adapters or not
    :param num_experts: experts that it scores
    :param place: what to call it in errors
    """

    def __init__(self, router: nn.Module, num_experts: int, place: str) -> None:
        self._num_experts = num_experts
        self._place = place
        self._log_score = _log_score(_without_adapters(router))
        self._are_probabilities: bool | None = None

    def read(self, output: Any) -> torch.Tensor:
        """Logits, [tokens, experts] in fp32.

        :param output: what the router returned
        :raises ValueError: the scores of all experts are not in it
        """
        raw = router_logits(output, self._num_experts)
        if raw is None:
            raise ValueError(
                f"The router of {self._place} does not tell how it scores its {self._num_experts} experts, so "
                "router_kl and load_balancing cannot be had for this model; give both the weight 0."
            )
        logits = raw.reshape(-1, self._num_experts).float()
        if self._are_probabilities is None:
            with torch.no_grad():
                self._are_probabilities = torch.equal(probabilities(logits), logits)
        return logits.clamp(min=_SMALLEST).log() if self._are_probabilities else self._log_score(logits)


def _log_score(router: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    function = getattr(router, "score_fn", None)
    if callable(function):
        return lambda logits: function(logits).clamp(min=_SMALLEST).log()
    # Where the config chooses one of several, the router's code names all of them.
    chosen = getattr(router, "expert_selection_fn", None)
    code = chosen if isinstance(chosen, str) else inspect.getsource(type(router).forward)
    return F.logsigmoid if "sigmoid" in code else lambda logits: logits


def _without_adapters(module: nn.Module) -> nn.Module:
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module
