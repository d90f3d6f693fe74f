"""Run linearized experts on routed tokens only, and watch each of them at work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from llmcompressor_moe.topology import expert_modules

__all__ = ["ExpertCall", "routed_forward", "scattered_forward"]

# (expert index, token indices [n], inputs [n, hidden], router weights [n], outputs [n, hidden])
ExpertCall = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def routed_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    on_expert: ExpertCall | None = None,
) -> torch.Tensor:
    """The experts' output, each expert run once on the tokens routed to it.

    Equal to the experts' own forward; upstream's runs every expert on every token during calibration.

    :param hidden_states: [tokens, hidden]
    :param top_k_index: [tokens, top_k] expert of each choice
    :param top_k_weights: [tokens, top_k] weight of each choice
    :param on_expert: called for every expert that has tokens, before weighting
    :return: [tokens, hidden]
    """
    modules = expert_modules(experts)
    # One sort groups the choices by expert: one device synchronisation per layer, not one per expert.
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(top_k_index.reshape(-1), minlength=len(modules)).tolist()
    tokens = order // top_k_index.shape[-1]
    weights = top_k_weights.reshape(-1)[order]
    output = torch.zeros_like(hidden_states)
    start = 0
    for index, count in enumerate(counts[: len(modules)]):
        if count:
            chosen = tokens[start : start + count]
            inputs = hidden_states[chosen]
            result = modules[index](inputs)
            if on_expert is not None:
                on_expert(index, chosen, inputs, weights[start : start + count], result)
            weighted = result * weights[start : start + count, None]
            output.index_add_(0, chosen, weighted.to(output.dtype))
        start += count
    return output


def scattered_forward(
    experts: nn.Module, hidden_states: torch.Tensor, on_expert: ExpertCall | None = None
) -> torch.Tensor:
    """The same for experts that get every token once per expert, zeroed where it is not routed (Llama 4).

    There the router's weight scales an expert's input, so the weight passed on is 1.

    :param hidden_states: [experts * tokens, hidden]
    :return: [experts * tokens, hidden]
    """
    modules = expert_modules(experts)
    by_expert = hidden_states.view(len(modules), -1, hidden_states.shape[-1])
    output = torch.zeros_like(by_expert)
    routed = by_expert.ne(0).any(dim=-1)
    for index, module in enumerate(modules):
        chosen = routed[index].nonzero().squeeze(-1)
        if len(chosen):
            inputs = by_expert[index, chosen]
            result = module(inputs)
            if on_expert is not None:
                on_expert(index, chosen, inputs, torch.ones_like(chosen, dtype=result.dtype), result)
            output[index, chosen] = result
    return output.reshape_as(hidden_states)
