"""Bytes that expert parallelism sends between ranks, counted choice by choice from what routers decided.

An MoE layer under expert parallelism makes two all-to-all exchanges: *dispatch* brings a token's hidden vector
to the ranks that hold its experts, *combine* brings their outputs back (GShard, arXiv 2006.16668). Sent as
DeepEP does (DeepSeek-V3, arXiv 2412.19437, section 3.2.2), a vector goes to each rank once, however many of
the token's experts that rank holds, and the rank returns their weighted sum; the naive way sends one vector
per chosen expert. Indices and weights of the choices, a few bytes each, are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict

from llmcompressor_moe.evaluation.history import match_layouts
from llmcompressor_moe.evaluation.routing import RoutingRecord
from llmcompressor_moe.report import DropReport

__all__ = [
    "AllToAll",
    "Communication",
    "CommunicationComparison",
    "DispatchFormat",
    "LayerCommunication",
    "Link",
    "compare_communication",
    "linear_placement",
    "measure_communication",
    "vector_bytes",
    "vectors_sent",
]

# How hidden vectors travel: 16 bit, or one byte per value with a 32-bit scale per token or per group of 128.
DispatchFormat = Literal["16-bit", "fp8-per-token", "fp8-per-group"]

GROUP = 128
_SCALE = 4


class Link(BaseModel):
    """One direction between two ranks, with the bytes it carries."""

    model_config = ConfigDict(extra="forbid")

    source: int
    target: int
    nbytes: int


class AllToAll(BaseModel):
    """One way of sending, in bytes for all tokens. What stays on its rank is in no figure but the diagonals.

    :param dispatch: [ranks, ranks] from the rank of a token to the ranks of its experts; on the diagonal what
        stays where it is
    :param combine: the way back, also [from, to]
    :param bytes_per_token: dispatch and combine over links, mean over tokens
    :param sent: per rank, dispatch and combine over links
    :param received: the same
    :param heaviest_link: the pair of ranks with the most bytes in one direction, both exchanges together; None
        where nothing moves
    """

    model_config = ConfigDict(extra="forbid")

    dispatch: list[list[int]]
    combine: list[list[int]]
    bytes_per_token: float
    sent: list[int]
    received: list[int]
    heaviest_link: Link | None


class LayerCommunication(BaseModel):
    """One MoE layer.

    :param width: length of the vectors that are sent
    :param experts_per_rank: how many experts each rank holds
    :param deduplicated: each vector once per rank that holds any of the token's experts
    :param per_choice: each vector once per chosen expert
    """

    model_config = ConfigDict(extra="forbid")

    width: int
    experts_per_rank: list[int]
    deduplicated: AllToAll
    per_choice: AllToAll


class Communication(BaseModel):
    """All MoE layers of a model.

    Tokens are spread over the ranks in order and as evenly as possible, experts likewise: vLLM's linear
    placement (``determine_expert_map``), where the first ranks hold one more if the ranks do not divide them.

    :param ranks: size of the expert-parallel group
    :param tokens: tokens counted
    :param dispatch_format: how vectors travel to the experts; they come back in 16 bit
    :param layers: block index -> layer; dropped layers move nothing and are not in it
    :param deduplicated: sum over layers
    :param per_choice: sum over layers
    """

    model_config = ConfigDict(extra="forbid")

    ranks: int
    tokens: int
    dispatch_format: DispatchFormat
    layers: dict[int, LayerCommunication]
    deduplicated: AllToAll
    per_choice: AllToAll


class CommunicationComparison(BaseModel):
    """Base and compressed model on the same tokens. Block indices are the base's in both."""

    model_config = ConfigDict(extra="forbid")

    before: Communication
    after: Communication


def linear_placement(count: int, ranks: int) -> torch.Tensor:
    """The rank of each of ``count`` things that are spread in order and as evenly as possible, int64 [count].

    The first ``count % ranks`` ranks get one more, as in vLLM's ``determine_expert_map``. Where ``ranks`` divides
    ``count``, thing i is on rank i * ranks // count.
    """
    size, more = divmod(count, ranks)
    sizes = torch.tensor([size + (rank < more) for rank in range(ranks)])
    return torch.arange(ranks).repeat_interleave(sizes)


def vector_bytes(width: int, form: DispatchFormat) -> int:
    """Bytes of one hidden vector of ``width`` values on its way, scales included."""
    if form == "16-bit":
        return 2 * width
    return width + _SCALE * (1 if form == "fp8-per-token" else -(-width // GROUP))


def vectors_sent(chosen: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors that dispatch sends from rank to rank: deduplicated, and one per choice.

    :param chosen: boolean [tokens, experts]
    :return: two int64 [from, to]
    """
    tokens, experts = chosen.shape
    per_rank = torch.zeros(tokens, ranks, dtype=torch.int64)
    per_rank.index_add_(1, linear_placement(experts, ranks), chosen.long())
    sources = linear_placement(tokens, ranks)

    def summed(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(ranks, ranks, dtype=torch.int64).index_add_(0, sources, values)

    return summed((per_rank > 0).long()), summed(per_rank)


def measure_communication(
    record: RoutingRecord, ranks: int, dispatch_format: DispatchFormat = "16-bit"
) -> Communication:
    """Count the bytes that a model's MoE layers exchange for the tokens of a record, taken as one batch.

    :param ranks: size of the expert-parallel group
    :raises ValueError: ``ranks`` is not positive, or ``dispatch_format`` is unknown
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: give the size of the expert-parallel group, at least 1.")
    if dispatch_format not in get_args(DispatchFormat):
        raise ValueError(
            f"dispatch_format={dispatch_format!r}: choose one of {', '.join(get_args(DispatchFormat))}."
        )
    layers = {}
    for block, trace in record.traces.items():
        width = record.widths[block]
        once, naive = (
            _all_to_all(
                vectors * vector_bytes(width, dispatch_format),
                vectors.T * vector_bytes(width, "16-bit"),
                record.tokens,
            )
            for vectors in vectors_sent(trace.chosen, ranks)
        )
        held = linear_placement(trace.chosen.shape[1], ranks).bincount(minlength=ranks)
        layers[block] = LayerCommunication(
            width=width, experts_per_rank=held.tolist(), deduplicated=once, per_choice=naive
        )
    return Communication(
        ranks=ranks,
        tokens=record.tokens,
        dispatch_format=dispatch_format,
        layers=layers,
        deduplicated=_total((layer.deduplicated for layer in layers.values()), ranks, record.tokens),
        per_choice=_total((layer.per_choice for layer in layers.values()), ranks, record.tokens),
    )


def compare_communication(
    base: RoutingRecord,
    compressed: RoutingRecord,
    history: Sequence[DropReport],
    ranks: int,
    *,
    base_history: Sequence[DropReport] = (),
    format_before: DispatchFormat = "16-bit",
    format_after: DispatchFormat = "16-bit",
) -> CommunicationComparison:
    """What two models exchange on the same number of ranks.

    :param history: what was dropped from the compressed model, see `read_history`
    :param base_history: what was dropped from the base itself before
    :param format_after: how vectors travel in the compressed model; fp8 where its experts take quantized
        activations and the engine quantizes before dispatch
    :raises ValueError: see `measure_communication` and `match_layouts`
    """
    kept = match_layouts(base.layout, compressed.layout, history, base_history)
    after = measure_communication(compressed, ranks, format_after)
    layers = {kept.blocks[position]: layer for position, layer in after.layers.items()}
    return CommunicationComparison(
        before=measure_communication(base, ranks, format_before),
        after=after.model_copy(update={"layers": layers}),
    )


def _all_to_all(dispatch: torch.Tensor, combine: torch.Tensor, tokens: int) -> AllToAll:
    """Put figures together from the bytes of both exchanges, int64 [from, to]."""
    moved = dispatch + combine
    moved = moved - moved.diag().diag()
    heaviest = None
    if bool(moved.any()):
        source, target = divmod(int(moved.argmax()), len(moved))
        heaviest = Link(source=source, target=target, nbytes=int(moved[source, target]))
    return AllToAll(
        dispatch=dispatch.tolist(),
        combine=combine.tolist(),
        bytes_per_token=int(moved.sum()) / max(tokens, 1),
        sent=moved.sum(dim=1).tolist(),
        received=moved.sum(dim=0).tolist(),
        heaviest_link=heaviest,
    )


def _total(layers: Iterable[AllToAll], ranks: int, tokens: int) -> AllToAll:
    dispatch, combine = (torch.zeros(ranks, ranks, dtype=torch.int64) for _ in range(2))
    for layer in layers:
        dispatch += torch.tensor(layer.dispatch)
        combine += torch.tensor(layer.combine)
    return _all_to_all(dispatch, combine, tokens)
