"""How a router scores experts, and its distribution over them, read from what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from llmcompressor_moe.compat.transformers.per_layer import general_value
from llmcompressor_moe.families import exception_for
from llmcompressor_moe.topology import text_config

__all__ = [
    "OTHER",
    "SIGMOID",
    "SOFTMAX",
    "RouterReader",
    "are_probabilities",
    "observed_scoring",
    "router_logits",
]

SOFTMAX, SIGMOID = "softmax", "sigmoid"
OTHER = "another function"

# A softmax in bfloat16 rounds every share by at most 1/512 of it, and so their sum by at most 0.002.
_SUM_TOLERANCE = 3e-3
# Logarithms of weights that bfloat16 rounded are off by at most 0.004 each; their differences by twice that, and
# by as much again where the logits were rounded, too.
_LOG_TOLERANCE = 0.03
_SMALLEST_WEIGHT = 1e-6
_SMALLEST_SCORE = 1e-30
_ROWS = 512

# What configs and routers call the function: DeepSeek, Cohere2-MoE, Megatron and its descendants, vLLM.
_NAMES = (
    "score_fn",
    "scoring_func",
    "score_function",
    "scoring_function",
    "expert_selection_fn",
    "moe_router_activation_func",
    "moe_router_score_function",
    "router_score_function",
)
_LOG_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    SOFTMAX: lambda logits: logits.log_softmax(-1),
    SIGMOID: F.logsigmoid,
}


class RouterReader:
    """Reads one router's outputs; the one place that decides whether its scores are a softmax over all experts.

    In this order: what the table of families says; what the router's outputs show (`observed_scoring`), looked
    at until one of them does; the function that the router or its config names; softmax. Outputs come before
    names, because transformers keeps fields of a config that its classes do not read.

    Limits to groups and corrections that are added for the choice alone are not part of the scores: DeepSeek-V2's
    are a softmax.

    :param router: the module, with adapters or not
    :param num_experts: experts that it scores
    :param config: of the model, or of its text part
    """

    def __init__(self, router: nn.Module, num_experts: int, config: PreTrainedConfig | None = None) -> None:
        text = text_config(config) if config is not None else None
        self._num_experts = num_experts
        self._function, self._named = _named(_without_adapters(router), text)
        self._decided = exception_for(text.model_type).router_scores if text is not None else None

    def scoring(self, output: Any) -> str:
        """`SOFTMAX`, `SIGMOID` or `OTHER`.

        :param output: what the router returned
        """
        if self._decided is None:
            with torch.no_grad():
                self._decided = observed_scoring(output, self._num_experts)
        return self._decided or self._named or SOFTMAX

    def probabilities(self, output: Any) -> torch.Tensor | None:
        """The softmax over all experts, [tokens, experts] in fp32; None where a router has none or does not tell.

        :param output: what the router returned
        """
        scores = self._flat(output)
        if scores is None or self.scoring(output) != SOFTMAX:
            return None
        return scores if are_probabilities(scores) else scores.softmax(dim=-1)

    def logits(self, output: Any) -> torch.Tensor | None:
        """Logits whose softmax over any of the experts is the router's distribution over them, [tokens, experts]
        in fp32; None where it does not tell.

        A softmax router's logits are such. One that scores experts with a function of their logits, a sigmoid in
        DeepSeek-V3, weighs an expert by its share of the scores of those that are chosen. So its distribution is
        the normalized scores (DeepSeek-V3, https://arxiv.org/abs/2412.19437, equation 19), and their logarithms
        are the logits wanted.

        :param output: what the router returned
        """
        scores = self._flat(output)
        if scores is None:
            return None
        scoring = self.scoring(output)
        if scoring == SIGMOID:
            return F.logsigmoid(scores)
        if scoring == OTHER:
            return None if self._function is None else _log(self._function(scores))
        return _log(scores) if are_probabilities(scores) else scores

    def _flat(self, output: Any) -> torch.Tensor | None:
        scores = router_logits(output, self._num_experts)
        return None if scores is None else scores.reshape(-1, self._num_experts).float()


def router_logits(output: Any, num_experts: int) -> torch.Tensor | None:
    """Among a router's outputs, the scores of all experts: floating point, last dimension = number of
    experts.
    """
    candidates = [
        value
        for value in _tensors(output)
        if value.is_floating_point() and value.ndim and value.shape[-1] == num_experts
    ]
    if len(candidates) > 1:
        # Where as many experts are chosen as there are, their weights have that shape, too; none is negative.
        candidates = [value for value in candidates if bool((value < 0).any())] or candidates
    return candidates[0] if candidates else None


def are_probabilities(scores: torch.Tensor) -> bool:
    """Whether every row is a distribution: not negative, and its sum 1 within what bfloat16 rounds away.

    :param scores: [tokens, experts]
    """
    if not scores.numel():
        return False
    sums = scores.sum(-1, dtype=torch.float32)
    return bool((scores >= 0).all()) and bool(((sums - 1).abs() <= _SUM_TOLERANCE).all())


def observed_scoring(output: Any, num_experts: int) -> str | None:
    """The function that a router's weights follow from its logits by: `SOFTMAX`, `SIGMOID` or `OTHER`; None where
    its outputs do not tell.

    Families renormalize weights or not, and scale them; what they agree on is the ratio of a token's weights, or
    with one expert per token that of two tokens' weights.

    :param output: what the router returned
    """
    logits = router_logits(output, num_experts)
    if logits is None or not logits.numel():
        return None
    if are_probabilities(logits.reshape(-1, num_experts)):
        return SOFTMAX
    weights, chosen = _decision(output, logits)
    if weights is None:
        return None
    rows = torch.linspace(0, len(chosen) - 1, min(len(chosen), _ROWS), device=chosen.device).long()
    weights, chosen = weights[rows].float(), chosen[rows]
    logits = logits.reshape(-1, num_experts)[rows].float()
    readable = (weights > _SMALLEST_WEIGHT).all(-1) & weights.isfinite().all(-1) & logits.isfinite().all(-1)
    weights, chosen, logits = weights[readable], chosen[readable], logits[readable]
    if weights.shape[-1] == 1 and _constant(weights):
        # The one weight was renormalized.
        return None
    fits = {
        name: _follows(weights, log_scores(logits).gather(-1, chosen))
        for name, log_scores in _LOG_SCORES.items()
    }
    if all(fits.values()):
        return None
    return next((name for name, fit in fits.items() if fit), OTHER)


def _follows(weights: torch.Tensor, log_scores: torch.Tensor) -> bool:
    """Whether weights are scores times a factor: one for each token, or one for all if a token has one expert."""
    factors = weights.log() - log_scores
    if factors.shape[-1] == 1:
        factors = factors.T
    if not factors.numel():
        return True
    return bool((factors.amax(-1) - factors.amin(-1) <= _LOG_TOLERANCE).all())


def _constant(weights: torch.Tensor) -> bool:
    return not weights.numel() or bool(weights.amax() - weights.amin() <= _LOG_TOLERANCE * weights.amax())


def _decision(output: Any, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weights and indices of the chosen experts, each [tokens, chosen]."""
    others = [value for value in _tensors(output) if value is not logits and value.ndim]
    tokens = logits.numel() // logits.shape[-1]
    for index in (value for value in others if not value.is_floating_point() and value.dtype != torch.bool):
        for weights in (value for value in others if value.is_floating_point()):
            if weights.shape == index.shape and weights.numel() == tokens * weights.shape[-1]:
                return weights.reshape(tokens, -1), index.reshape(tokens, -1).long()
    for weights in (value for value in others if value.is_floating_point() and value.shape == logits.shape):
        # One entry for every expert, zero where it was not chosen (Llama 4).
        flat = weights.reshape(tokens, -1)
        count = int((flat > 0).sum(-1).amax())
        if 0 < count < flat.shape[-1]:
            return flat.topk(count, dim=-1)
    return None, None


def _named(
    router: nn.Module, config: PreTrainedConfig | None
) -> tuple[Callable[[torch.Tensor], torch.Tensor] | None, str | None]:
    """The function that scores experts, where the router holds it, and which it is by name; None for what is not
    said.
    """
    values = [getattr(router, name, None) for name in _NAMES]
    if config is not None:
        values += [general_value(config, name) for name in _NAMES]
    function = next((value for value in values if callable(value)), None)
    name = next((value.lower() for value in values if isinstance(value, str)), None)
    if name is None:
        return function, None if function is None else OTHER
    return function, name if name in _LOG_SCORES else OTHER


def _without_adapters(module: nn.Module) -> nn.Module:
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module


def _tensors(output: Any) -> list[torch.Tensor]:
    values = [output] if isinstance(output, torch.Tensor) else output
    return [value for value in values if isinstance(value, torch.Tensor)]


def _log(scores: torch.Tensor) -> torch.Tensor:
    return scores.clamp(min=_SMALLEST_SCORE).log()
