"""Mathematics of merging: several feed-forwards into one. Pure functions on `FeedForward`, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmcompressor_moe.recovery.dense.parts import FeedForward

__all__ = ["average", "choose_neurons", "joined", "refitted_down", "scaled", "take", "widened"]


def average(experts: Sequence[FeedForward], shares: Sequence[float]) -> FeedForward:
    """The experts' weights, averaged neuron by neuron.

    y = D~ (act(G~ x) * (U~ x)) with G~ = sum_e p_e G_e and so on: a merge in weight space, as in model soups
    (Wortsman et al., https://arxiv.org/abs/2203.05482) and, with the use of the experts as p, in MC-SMoE
    (Li et al., https://arxiv.org/abs/2310.01334). Exact where all experts are equal. It supposes that
    neuron j does the same in every expert, which holds for experts copied from one dense model and is false for
    experts trained apart.

    :param experts: all of one width
    :param shares: p_e, of any positive sum
    :raises ValueError: no share is positive
    """
    p = torch.tensor(list(shares), dtype=torch.float64)
    if not bool((p >= 0).all()) or not float(p.sum()) > 0:
        raise ValueError(f"shares={list(shares)}: give at least one positive share and no negative one.")
    p = (p / p.sum()).to(experts[0].gate)

    def mean(name: str) -> torch.Tensor:
        return sum(w * getattr(expert, name) for w, expert in zip(p, experts, strict=True))

    return FeedForward(mean("gate"), mean("up"), mean("down"))


def choose_neurons(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the highest scores, [min(width, neurons)], in ascending order; the first of equals."""
    return torch.argsort(scores, descending=True, stable=True)[:width].sort().values


def take(pool: FeedForward, neurons: torch.Tensor) -> FeedForward:
    """Some of the neurons, [n] indices."""
    return FeedForward(pool.gate[neurons], pool.up[neurons], pool.down[:, neurons])


def scaled(ffn: FeedForward, factor: float | torch.Tensor) -> FeedForward:
    """Outputs times a factor, one for all neurons or one each ([neurons]); exact, as down is linear."""
    return FeedForward(ffn.gate, ffn.up, ffn.down * factor)


def joined(parts: Sequence[FeedForward]) -> FeedForward:
    """One feed-forward whose output is the sum of the parts' outputs; exact."""
    return FeedForward(
        torch.cat([part.gate for part in parts]),
        torch.cat([part.up for part in parts]),
        torch.cat([part.down for part in parts], dim=1),
    )


def widened(ffn: FeedForward, width: int, generator: torch.Generator) -> FeedForward:
    """The same function with more neurons, whose outputs are zero.

    Their inputs are random, of the spread that the others have: with zeros on both sides no gradient would ever
    reach them, with zeros on one side they are free for recovery to use.

    :param generator: on the CPU
    :raises ValueError: there are more neurons than that already
    """
    more = width - ffn.width
    if more < 0:
        raise ValueError(f"width={width}: the feed-forward has {ffn.width} neurons; give at least that.")
    if not more:
        return ffn
    hidden = ffn.gate.shape[1]

    def rows(like: torch.Tensor) -> torch.Tensor:
        spread = float(like.std()) if like.numel() > 1 else hidden**-0.5
        return (torch.randn(more, hidden, generator=generator) * spread).to(like)

    return joined([ffn, FeedForward(rows(ffn.gate), rows(ffn.up), ffn.down.new_zeros(hidden, more))])


def refitted_down(
    gram: torch.Tensor, residual: torch.Tensor, down: torch.Tensor, ridge: float = 1e-2
) -> torch.Tensor:
    """Output weights that give the least squared error on calibration data, drawn towards those given.

    With activations H [tokens, neurons] and wanted outputs Y [tokens, hidden] it is the D that minimises
    ||Y - H D^T||^2 + lambda ||D - D0||^2, so D^T = D0^T + (H^T H + lambda I)^-1 H^T (Y - H D0^T): the
    reconstruction step of channel pruning (He, Zhang, Sun, https://arxiv.org/abs/1707.06168, with
    the channels fixed), with ridge regression's penalty around D0, so that neurons which the data hardly moves
    keep their weights.

    :param gram: H^T H, [neurons, neurons]
    :param residual: H^T (Y - H D0^T), [neurons, hidden]
    :param down: D0, [hidden, neurons]
    :param ridge: lambda over the mean of the gram matrix' diagonal
    :return: D, [hidden, neurons]
    :raises FloatingPointError: the sums are NaN or infinite
    """
    if not bool(gram.isfinite().all() and residual.isfinite().all()):
        raise FloatingPointError(
            "Calibration gave activations that are NaN or infinite; nothing was written. Check the weights and "
            "the dtype (a model in float16 often overflows: load it in bfloat16)."
        )
    penalty = ridge * float(gram.diagonal().mean())
    if penalty <= 0:
        return down
    system = gram.double() + penalty * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    correction = torch.linalg.solve(system, residual.double(), left=True)
    return down + correction.T.to(down)
