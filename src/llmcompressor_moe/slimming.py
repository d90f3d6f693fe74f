"""What Linears weigh in a quantization scheme, from the model's layout alone: no weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from pydantic import BaseModel
from torch import nn

from llmcompressor_moe.check.expected import ExpectedModel
from llmcompressor_moe.parts import block_of, part_of
from llmcompressor_moe.quantization.schemes import Candidate, SchemeSpec, resolve_schemes, why_not_divisible
from llmcompressor_moe.quantization.sizes import linear_size

__all__ = ["DEFAULT_SCHEMES", "LinearShape", "SchemeSize", "expert_linears", "linears_of", "scheme_sizes"]

DEFAULT_SCHEMES = ("W4A16", "W8A16")


class LinearShape(NamedTuple):
    """Sizes of a Linear, as in nn.Linear."""

    in_features: int
    out_features: int
    bias: bool


class SchemeSize(BaseModel):
    """Linears in one scheme.

    :param bits: bits per weight, scales and zero points counted; None where the scheme does not fit
    :param nbytes: bytes of their tensors; None where the scheme does not fit
    :param refused: why it does not fit
    """

    scheme: str
    bits: float | None = None
    nbytes: int | None = None
    refused: str | None = None


def expert_linears(expected: ExpectedModel) -> Counter[LinearShape]:
    """The Linears of all routed experts, counted; fused experts as llm-compressor splits them."""
    found = Counter(
        LinearShape(site.in_features, site.out_features, site.bias)
        for site in expected.sites.values()
        if site.kind == "expert"
    )
    found.update(
        LinearShape(linear.shape[1], linear.shape[0], linear.bias)
        for linear in expected.linearized.values()
        if linear.native is None
    )
    return found


def linears_of(expected: ExpectedModel, parts: Collection[str]) -> Counter[LinearShape]:
    """The Linears of kinds of parts other than routed experts, counted."""
    return Counter(
        LinearShape(site.in_features, site.out_features, site.bias)
        for site in expected.sites.values()
        if site.kind == "linear"
        and part_of(f"{site.runtime}.weight", block_of(site.runtime, expected.topology)) in parts
    )


def scheme_sizes(
    linears: Counter[LinearShape],
    specs: Sequence[SchemeSpec],
    group_size: int | None,
    dtype: torch.dtype,
    beside: Collection[LinearShape] = (),
) -> list[SchemeSize]:
    """Linears in each of several schemes.

    :param specs: preset names of compressed-tensors, or schemes written out
    :param group_size: replaces the group size of group-wise integer schemes
    :param dtype: dtype of the plain weights
    :param beside: other Linears that share the group size, which a way out has to suit
    :raises ValueError: a scheme is unknown, malformed or named twice
    """
    inputs = {shape.in_features for shape in (*linears, *beside)}
    return [
        _size(candidate, linears, dtype, inputs) for candidate in resolve_schemes(specs, group_size, "scheme")
    ]


def _size(
    candidate: Candidate, linears: Counter[LinearShape], dtype: torch.dtype, inputs: Collection[int]
) -> SchemeSize:
    nbytes = bits = weights = 0
    for shape, count in linears.items():
        if candidate.scheme is not None:
            reason = why_not_divisible(candidate.scheme, shape.out_features, shape.in_features, inputs)
            if reason is not None:
                return SchemeSize(scheme=candidate.name, refused=reason)
        size = linear_size("", nn.Linear(*shape, device="meta", dtype=dtype), candidate.scheme)
        nbytes += count * size.nbytes
        bits += count * size.bits
        weights += count * size.weights
    return SchemeSize(scheme=candidate.name, bits=bits / weights, nbytes=nbytes)
