"""What a model costs to store and to run, as plain numbers.

Bytes count what decode reads from memory for one step, which bounds its speed at small batches (Pope et al.,
"Efficiently Scaling Transformer Inference", 2022, section 2): each weight that any token of the batch needs
once, and each sequence's keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from llmcompressor_moe.report import ShownPath

__all__ = [
    "AttentionCost",
    "DecodeBytes",
    "ExpertBytes",
    "ModelCost",
    "PartCost",
    "TokenFlops",
    "expected_distinct_experts",
]


class PartCost(BaseModel):
    """One kind of part over the whole model.

    :param parameters: original weights, before any quantization
    :param active_parameters: those that one token passes
    :param nbytes: stored bytes: weights, scales, zero points
    :param read_nbytes: bytes that decode reads for one token
    """

    part: str
    parameters: int
    active_parameters: int
    nbytes: int
    read_nbytes: float


class AttentionCost(BaseModel):
    """Softmax attention of one block.

    :param block: block index
    :param heads: query heads
    :param qk_dim: size of a query's head
    :param v_dim: size of a value's head
    :param cached_values: numbers that the cache keeps per token: keys and values of all key-value heads, or, in
        multi-head latent attention, the latent with the rotary part of the key
    :param window: tokens that it looks back at most, itself counted; None: all
    """

    block: int
    heads: int
    qk_dim: int
    v_dim: int
    cached_values: int
    window: int | None

    def attended(self, context: int) -> int:
        """Tokens that it attends to at a context length, the token itself counted."""
        return context if self.window is None else min(context, self.window)


class ExpertBytes(BaseModel):
    """Routed experts of one MoE layer.

    :param block: block index
    :param top_k: experts that a token is routed to
    :param nbytes: stored bytes of each expert
    """

    block: int
    top_k: int
    nbytes: list[float]


class TokenFlops(BaseModel):
    """Floating-point operations of one token's forward, a multiplication and an addition counted as two.

    :param context: tokens that attention sees, the token itself counted
    :param linears: every matrix that the token passes, router and head with it; no embedding look-up
    :param attention: scores and weighted values of softmax attention
    """

    context: int
    linears: int
    attention: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linears + self.attention


class DecodeBytes(BaseModel):
    """Bytes that one step of decode reads, expected over routing.

    :param batch: sequences, each of which gets one token
    :param context: tokens of each sequence, the new one counted
    :param weights: weights that every token passes, and one row of each embedding per token
    :param experts: routed experts that any token of the batch is routed to
    :param kv_cache: keys and values
    """

    batch: int
    context: int
    weights: float
    experts: float
    kv_cache: float

    @property
    def step(self) -> float:
        """Bytes of the step."""
        return self.weights + self.experts + self.kv_cache

    @property
    def per_token(self) -> float:
        """Bytes per generated token."""
        return self.step / self.batch


class ModelCost(BaseModel):
    """What a checkpoint takes and what a token costs.

    :param nbytes: bytes of all tensors; the parts' ``nbytes`` add up to it
    :param header_nbytes: what the files hold beyond tensors
    :param parameters: original weights, before any quantization; tied ones once
    :param active_parameters: those that one token passes, the whole embedding table counted
    :param linear_flops: operations of a token in all matrices
    :param weight_nbytes: bytes of weights that every token passes
    :param row_nbytes: bytes of one row of each embedding
    :param kv_itemsize: bytes of a number in the KV cache
    :param flops: at the context lengths that were asked for
    :param decode: at the batch sizes and context lengths that were asked for
    :param notes: what the numbers leave out in this architecture
    """

    path: ShownPath
    nbytes: int
    header_nbytes: int
    parameters: int
    active_parameters: int
    parts: list[PartCost]
    linear_flops: int
    attention: list[AttentionCost]
    experts: list[ExpertBytes]
    weight_nbytes: int
    row_nbytes: float
    kv_itemsize: float
    flops: list[TokenFlops]
    decode: list[DecodeBytes]
    notes: list[str]

    def flops_at(self, context: int) -> TokenFlops:
        """Operations of one token: ``2 x weights`` in matrices, ``2 x heads x (qk_dim + v_dim) x context`` in
        attention (Kaplan et al., "Scaling Laws for Neural Language Models", 2020, table 1).

        :param context: tokens that attention sees, the token itself counted
        :raises ValueError: it is not positive
        """
        _positive("context", context)
        attention = sum(
            2 * layer.heads * (layer.qk_dim + layer.v_dim) * layer.attended(context)
            for layer in self.attention
        )
        return TokenFlops(context=context, linears=self.linear_flops, attention=attention)

    def decode_at(
        self, batch: int = 1, context: int = 1, routing: Mapping[int, Sequence[float]] | None = None
    ) -> DecodeBytes:
        """Bytes that one step of decode reads.

        :param batch: sequences
        :param context: tokens of each, the new one counted
        :param routing: block index -> for each expert the share of tokens that are routed to it, which add up
            to top-k; every MoE layer is needed. Without it all experts are alike.
        :raises ValueError: a number is not positive, or ``routing`` does not fit the model
        """
        _positive("batch", batch)
        _positive("context", context)
        if routing is not None:
            _check_routing(routing, self.experts)
        experts = 0.0
        for layer in self.experts:
            shares = routing[layer.block] if routing is not None else _uniform(layer)
            experts += math.fsum(
                nbytes * _touched(share, batch) for nbytes, share in zip(layer.nbytes, shares, strict=True)
            )
        cached = sum(layer.cached_values * layer.attended(context) for layer in self.attention)
        return DecodeBytes(
            batch=batch,
            context=context,
            weights=self.weight_nbytes + batch * self.row_nbytes,
            experts=experts,
            kv_cache=batch * cached * self.kv_itemsize,
        )


def expected_distinct_experts(experts: int, top_k: int, batch: int) -> float:
    """Distinct experts that a batch of tokens is routed to, expected if each token's experts are drawn
    uniformly and independently: ``E (1 - (1 - k/E)^b)``.

    :raises ValueError: a number is not positive
    """
    for name, value in (("experts", experts), ("top_k", top_k), ("batch", batch)):
        _positive(name, value)
    return experts * _touched(min(1.0, top_k / experts), batch)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")


def _touched(share: float, batch: int) -> float:
    """Probability that any of ``batch`` independent tokens is routed to an expert."""
    return 1 - (1 - share) ** batch


def _uniform(layer: ExpertBytes) -> list[float]:
    count = len(layer.nbytes)
    return [min(1.0, layer.top_k / count)] * count


def _check_routing(routing: Mapping[int, Sequence[float]], layers: Sequence[ExpertBytes]) -> None:
    for layer in layers:
        shares = routing.get(layer.block)
        if shares is None:
            raise ValueError(
                f"routing has blocks {sorted(routing)}, but block {layer.block} has an MoE layer too; give every "
                "MoE layer's shares, or none."
            )
        if len(shares) != len(layer.nbytes):
            raise ValueError(
                f"routing[{layer.block}] has {len(shares)} shares; the layer has {len(layer.nbytes)} experts."
            )
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"routing[{layer.block}] goes from {min(shares)} to {max(shares)}; give each expert's share of "
                "tokens, 0 to 1."
            )
        total, wanted = math.fsum(shares), min(layer.top_k, len(shares))
        if abs(total - wanted) > 1e-3 * wanted:
            raise ValueError(
                f"routing[{layer.block}] adds up to {total:.4g}; shares of tokens add up to top-k, {wanted}. "
                "Divide counts by the number of tokens, not by their sum."
            )
