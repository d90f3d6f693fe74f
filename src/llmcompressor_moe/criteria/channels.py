"""Which channels of an expert stay, and the down projection that makes up for those that go. Pure functions.

A channel of an expert is one row of its gate and up projections and the column of its down projection that reads
it. With the down projection W, [hidden, width], and the second moments M = sum over routed tokens of g² a aᵀ,
where a is what enters it and g the router's weight, cutting the channels outside S changes the layer's output by
tr((W - W' P) M (W - W' P)ᵀ), P selecting S: the sum over tokens of the squared difference.
"""

from __future__ import annotations

import torch

__all__ = [
    "fitted_down",
    "highest",
    "keep_by_surgery",
    "magnitude",
    "output_power",
    "saliency",
    "squared_error",
]

# Share of the mean second moment that is added to the diagonal, as GPTQ does.
_DAMPING = 0.01
# An expert that saw as many tokens as it has channels keeps its weights eleven times as firmly as others.
_CAUTION = 10
# Channels of one expert are chosen in about so many rounds.
_ROUNDS = 64


def saliency(power: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Sum over routed tokens of (router weight times activation)², times the squared norm of the channel's column:
    the squared output that is lost with it alone.

    :param power: [width] the former sum
    :param down: [hidden, width]
    :return: [width]
    """
    return power.double() * down.double().square().sum(dim=0)


def magnitude(rows: list[torch.Tensor], down: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of all weights of a channel; needs no data.

    :param rows: gate and up projection, or the up projection alone, [width, hidden] each
    :param down: [hidden, width]
    :return: [width]
    """
    squares = [matrix.double().square().sum(dim=1) for matrix in rows]
    return torch.stack([*squares, down.double().square().sum(dim=0)]).sum(dim=0).sqrt()


def highest(scores: torch.Tensor, count: int) -> list[int]:
    """The ``count`` channels with the highest scores, in order; of equal ones the first."""
    order = torch.argsort(scores.cpu(), descending=True, stable=True)
    return sorted(order[:count].tolist())


def keep_by_surgery(moments: torch.Tensor, down: torch.Tensor, count: int, tokens: int) -> list[int]:
    """Choose channels by optimal brain surgery (Hassibi and Stork, 1993; for columns of a matrix as in SparseGPT,
    arXiv 2301.00774): those go whose absence costs least when the columns that stay make up for it.

    Without channel c the error grows by |w_c|² / (M⁻¹)_cc, and W by -w_c (M⁻¹)_c / (M⁻¹)_cc. Some channels go in
    each round; what they cost is looked at again for the next.

    :param moments: [width, width] M
    :param down: [hidden, width]
    :param count: channels that stay
    :param tokens: behind the moments
    :return: sorted channels that stay
    """
    width = len(moments)
    # The damping bounds the condition, so fp32 tells costs apart; what stays is fitted in fp64.
    inverse = torch.linalg.inv(_damped(moments, tokens)).float()
    gram = (down.double().T @ down.double()).float()
    left = torch.arange(width, device=moments.device)
    step = max(1, width // _ROUNDS)
    while len(left) > count:
        cost = gram.diagonal() / inverse.diagonal()
        order = torch.argsort(cost, stable=True)
        going, there = order.split([min(step, len(left) - count), max(count, len(left) - step)])
        there = there.sort().values
        # W' = W T with T = I - E (E^T M^-1 E)^-1 E^T M^-1, of which only the columns that stay are kept.
        rows = inverse[going]
        solved = torch.linalg.solve(rows[:, going], rows[:, there])
        both = gram[there]
        cross = both[:, going] @ solved
        gram = both[:, there] - cross - cross.T + solved.T @ gram[going][:, going] @ solved
        inverse = inverse[there][:, there] - rows[:, there].T @ solved
        left = left[there]
    return left.tolist()


def fitted_down(moments: torch.Tensor, down: torch.Tensor, kept: list[int], tokens: int) -> torch.Tensor:
    """The down projection on the channels ``kept`` that loses least of the expert's output.

    It minimizes the squared error plus r times its squared distance from the columns as they were, so an expert
    that saw few tokens changes little: r is a hundredth of the mean second moment, times 1 + 10 width / tokens.

    :param moments: [width, width] M
    :param down: [hidden, width]
    :param tokens: behind the moments
    :return: [hidden, len(kept)], fp64
    """
    ridge = _ridge(moments, tokens)
    index = torch.tensor(kept, device=moments.device)
    right = moments.double()[:, index]
    right[index, torch.arange(len(kept), device=moments.device)] += ridge
    left = moments.double()[index][:, index]
    left.diagonal().add_(ridge)
    return down.double() @ torch.linalg.solve(left, right.T).T


def squared_error(inputs: torch.Tensor, down: torch.Tensor, kept: list[int], new: torch.Tensor) -> float:
    """Sum over tokens of the squared difference that a cut makes.

    :param inputs: [tokens, width] router weight times activation
    :param down: [hidden, width]
    :param new: [hidden, len(kept)]
    """
    change = down.double().clone()
    change[:, kept] -= new.double()
    return float((inputs.double() @ change.T).square().sum())


def output_power(inputs: torch.Tensor, down: torch.Tensor) -> float:
    """Sum over tokens of the squared output.

    :param inputs: [tokens, width]
    """
    return float((inputs.double() @ down.double().T).square().sum())


def _ridge(moments: torch.Tensor, tokens: int) -> float:
    mean = float(moments.diagonal().double().mean())
    return max(mean, torch.finfo(torch.float64).tiny) * _DAMPING * (1 + _CAUTION * len(moments) / tokens)


def _damped(moments: torch.Tensor, tokens: int) -> torch.Tensor:
    damped = moments.double().clone()
    damped.diagonal().add_(_ridge(moments, tokens))
    return damped
