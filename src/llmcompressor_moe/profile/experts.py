"""Run linearized experts on routed tokens only, and watch each of them at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from llmcompressor_moe.topology import expert_modules

__all__ = [
    "ExpertCall",
    "ExpertRun",
    "routed_forward",
    "run_plainly",
    "run_silenced",
    "scattered_forward",
    "sums_by_expert",
]

# (expert index, token indices [n], inputs [n, hidden], router weights [n], outputs [n, hidden])
ExpertCall = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
# (expert, its index, token indices [n], inputs [n, hidden]) -> outputs [n, hidden]
ExpertRun = Callable[[nn.Module, int, torch.Tensor, torch.Tensor], torch.Tensor]


def run_plainly(expert: nn.Module, _index: int, _tokens: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """An expert as it is."""
    return expert(inputs)


def run_silenced(
    kept: Sequence[torch.Tensor | None], lengths: Sequence[int], device: torch.device
) -> ExpertRun:
    """Experts that lack some channels for some tokens, as if these had been cut: zeros enter the down projection.

    Token indices of the run are places in a row of parts, each of which may lack other channels.

    :param kept: for each part, boolean [experts, width]; None: all channels
    :param lengths: tokens of each part
    """
    distinct = list({id(mask): mask for mask in kept if mask is not None}.values())
    # Entry 0: nothing is gone.
    gone = torch.stack([torch.zeros_like(distinct[0]), *(~mask for mask in distinct)]).to(device)
    entry = {id(mask): number for number, mask in enumerate(distinct, start=1)}
    entries = torch.tensor([entry.get(id(mask), 0) for mask in kept], device=device)
    of_token = entries.repeat_interleave(torch.tensor(lengths, device=device))

    def run(expert: nn.Module, index: int, tokens: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        rows = gone[of_token[tokens], index]
        handle = expert.down_proj.register_forward_pre_hook(
            lambda _module, args: (args[0].masked_fill(rows.to(args[0].device), 0), *args[1:])
        )
        try:
            return expert(inputs)
        finally:
            handle.remove()

    return run


def routed_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    on_expert: ExpertCall | None = None,
    keep: torch.Tensor | None = None,
    run: ExpertRun = run_plainly,
) -> torch.Tensor:
    """The experts' output, each expert run once on the tokens routed to it.

    Equal to the experts' own forward; upstream's runs every expert on every token during calibration.

    :param hidden_states: [tokens, hidden]
    :param top_k_index: [tokens, top_k] expert of each choice
    :param top_k_weights: [tokens, top_k] weight of each choice
    :param on_expert: called for every expert that has tokens, before weighting
    :param keep: boolean [tokens], True for those that ``on_expert`` sees; None: all
    :param run: what an expert does with its tokens
    :return: [tokens, hidden]
    """
    modules = expert_modules(experts)
    top_k = top_k_index.shape[-1]
    chosen = top_k_index.reshape(-1)
    order, counts = _grouped(chosen, None if keep is None else keep.repeat_interleave(top_k), len(modules))
    tokens = order // top_k
    weights = top_k_weights.reshape(-1)[order]
    output = torch.zeros_like(hidden_states)
    start = 0
    for module, (index, (kept, count)) in zip(modules, enumerate(counts), strict=False):
        if count:
            there = tokens[start : start + count]
            inputs = hidden_states[there]
            result = run(module, index, there, inputs)
            gates = weights[start : start + count]
            if on_expert is not None and kept:
                on_expert(index, there[:kept], inputs[:kept], gates[:kept], result[:kept])
            weighted = (result * gates[:, None]).to(output.dtype)
            # On a CPU that others use as well index_add_ takes several times as long.
            output.scatter_add_(0, there[:, None].expand_as(weighted), weighted)
        start += count
    return output


def scattered_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    on_expert: ExpertCall | None = None,
    keep: torch.Tensor | None = None,
    run: ExpertRun = run_plainly,
) -> torch.Tensor:
    """The same for experts that get every token once per expert, zeroed where it is not routed (Llama 4).

    There the router's weight scales an expert's input, so the weight passed on is 1.

    :param hidden_states: [experts * tokens, hidden]
    :return: [experts * tokens, hidden]
    """
    modules = expert_modules(experts)
    by_expert = hidden_states.view(len(modules), -1, hidden_states.shape[-1])
    output = torch.zeros_like(by_expert)
    chosen, tokens = by_expert.ne(0).any(dim=-1).nonzero(as_tuple=True)
    order, counts = _grouped(chosen, None if keep is None else keep[tokens], len(modules))
    tokens = tokens[order]
    start = 0
    for module, (index, (kept, count)) in zip(modules, enumerate(counts), strict=False):
        if count:
            there = tokens[start : start + count]
            inputs = by_expert[index, there]
            result = run(module, index, there, inputs)
            if on_expert is not None and kept:
                gates = torch.ones(kept, dtype=result.dtype, device=result.device)
                on_expert(index, there[:kept], inputs[:kept], gates, result[:kept])
            output[index, there] = result
        start += count
    return output.reshape_as(hidden_states)


def sums_by_expert(counts: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Sums over each expert's tokens, [columns, experts] in fp64 on the device of the values.

    :param counts: tokens per expert
    :param values: [tokens, columns], sorted by expert
    """
    lengths = torch.tensor(counts, device=values.device)
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, axis=0, unsafe=True).T


def _grouped(
    chosen: torch.Tensor, keep: torch.Tensor | None, num_experts: int
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """An order that groups choices by expert, the kept ones of each first, and how many are (kept, there at all)
    per expert. One sort: the device is waited for once per layer, not once per expert.

    :param chosen: [choices] expert of each; families that may skip name one past the last expert
    :param keep: boolean [choices]
    """
    key = 2 * chosen if keep is None else 2 * chosen + ~keep
    pairs = torch.bincount(key, minlength=2 * num_experts).tolist()[: 2 * num_experts]
    counts = [(kept, kept + rest) for kept, rest in zip(pairs[::2], pairs[1::2], strict=True)]
    return torch.argsort(key, stable=True), counts
