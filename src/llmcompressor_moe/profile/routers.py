"""Read a router's scores from what it returns."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

__all__ = ["RouterReader", "is_softmax_router", "probabilities", "router_logits"]


class RouterReader:
    """Reads the probabilities of one router. What kind of scores it gives is found out once: a look at numbers
    makes the CPU wait for an accelerator.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._place: int | None = None
        self._are_probabilities: bool | None = None

    def __call__(self, output: Any) -> torch.Tensor | None:
        """Probabilities over all experts, [tokens, experts] in fp32; None where the router gives none.

        :param output: what the router returned
        """
        values = [output] if isinstance(output, torch.Tensor) else list(output)
        if self._place is None:
            logits = router_logits(output, self._num_experts)
            if logits is None:
                return None
            self._place = next(place for place, value in enumerate(values) if value is logits)
        flat = values[self._place].reshape(-1, self._num_experts).float()
        if self._are_probabilities is None:
            self._are_probabilities = _are_probabilities(flat)
        return flat if self._are_probabilities else flat.softmax(dim=-1)


def router_logits(output: Any, num_experts: int) -> torch.Tensor | None:
    """Among a router's outputs, the scores of all experts: floating point, last dimension = number of
    experts.
    """
    candidates = [
        value
        for value in ([output] if isinstance(output, torch.Tensor) else output)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1] == num_experts
    ]
    if len(candidates) > 1:
        # Where as many experts are chosen as there are, their weights have that shape, too; none is negative.
        candidates = [value for value in candidates if bool((value < 0).any())] or candidates
    return candidates[0] if candidates else None


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities over all experts, [tokens, experts] in fp32, from scores or (some routers) probabilities."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return flat if _are_probabilities(flat) else flat.softmax(dim=-1)


def _are_probabilities(scores: torch.Tensor) -> bool:
    return bool((scores >= 0).all()) and bool(torch.allclose(scores.sum(-1), scores.new_ones(()), atol=1e-3))


def is_softmax_router(router: nn.Module) -> bool:
    """Softmax over all experts, as in Mixtral and Qwen2-MoE; group-limited and sigmoid routers (DeepSeek) are
    not.
    """
    if hasattr(router, "num_group"):
        return False
    source = inspect.getsource(type(router).forward)
    return "sigmoid" not in source
