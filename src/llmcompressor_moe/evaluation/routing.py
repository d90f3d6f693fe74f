"""What compression did to the routers: the choices of two models on the same tokens, expert by expert."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.evaluation.history import KeptParts, ModelLayout, layout_of, match_layouts
from llmcompressor_moe.profile.forward import sum_over_ranks, tokens_of
from llmcompressor_moe.profile.observing import hidden_argument
from llmcompressor_moe.profile.routing import RouterTrace, trace_routing
from llmcompressor_moe.report import DropReport
from llmcompressor_moe.routing.fidelity import RoutingFidelity, routing_fidelity
from llmcompressor_moe.topology import Topology, find_topology

__all__ = [
    "LayerRouting",
    "RoutingComparison",
    "RoutingRecord",
    "RoutingSummary",
    "compare_records",
    "compare_routing",
    "record_routing",
]

MAX_TOKENS = 8192


@dataclass(frozen=True)
class RoutingRecord:
    """What the routers of one model decided, on the CPU: experts + 4 x experts bytes per token and MoE layer.

    :param layout: the model's parts
    :param tokens: tokens seen, padding left out
    :param traces: block index -> its router's decisions
    :param widths: block index -> length of the vectors that enter its experts
    """

    layout: ModelLayout
    tokens: int
    traces: dict[int, RouterTrace]
    widths: dict[int, int]


class LayerRouting(BaseModel):
    """One MoE layer in both models.

    :param compressed_block: index of its block in the compressed model
    :param kept_experts: the base's indices of its experts that are left
    :param routing: see `RoutingFidelity`
    """

    model_config = ConfigDict(extra="forbid")

    compressed_block: int
    kept_experts: list[int]
    routing: RoutingFidelity


class RoutingSummary(BaseModel):
    """All MoE layers that both models have: the mean over layers and tokens; see `RoutingFidelity`.

    A figure that some layers cannot tell is the mean over those that can, None where none can.

    :param layers: their number
    :param load_change: mean over layers, and so the coefficients of variation
    :param dead_before: experts that no token chose, in all layers together
    """

    model_config = ConfigDict(extra="forbid")

    layers: int
    top_k_overlap: float
    top_k_overlap_kept: float | None
    replaced: float
    router_kl: float | None
    load_change: float
    load_cv_before: float
    load_cv_after: float
    dead_before: int
    dead_after: int


class RoutingComparison(BaseModel):
    """The routers of a compressed model against the base's, on the same tokens. Indices are the base's.

    :param tokens: tokens compared
    :param dropped_blocks: blocks that are gone
    :param dropped_layers: MoE layers that are gone from blocks that are left
    :param dropped_experts: block index -> experts that are gone from MoE layers that are left
    :param layers: block index -> comparison, for MoE layers that both models have
    :param mean: all of them together; None where no MoE layer is left
    """

    model_config = ConfigDict(extra="forbid")

    tokens: int
    dropped_blocks: list[int]
    dropped_layers: list[int]
    dropped_experts: dict[int, list[int]]
    layers: dict[int, LayerRouting]
    mean: RoutingSummary | None


def compare_routing(
    base: PreTrainedModel,
    compressed: PreTrainedModel,
    history: Sequence[DropReport],
    batches: Sequence[dict[str, Any]],
    *,
    base_history: Sequence[DropReport] = (),
    max_tokens: int = MAX_TOKENS,
) -> RoutingComparison:
    """Run both models once and compare what their routers choose.

    Models may be trimmed, quantized (loaded inside `load_trimmed_moe`, they run as they will be served),
    linearized or fused; they are not changed.

    :param history: what was dropped from the compressed model, see `read_history`
    :param batches: keyword arguments of the models, ``input_ids`` [batch, sequence] among them
    :param base_history: what was dropped from the base itself before
    :param max_tokens: see `record_routing`
    :raises ValueError: the history does not lead from the base to the compressed model, or there is no data
    :raises NotAnMoEError: the base has no MoE layer
    """
    match_layouts(layout_of(base), layout_of(compressed), history, base_history)
    records = [record_routing(model, batches, max_tokens=max_tokens) for model in (base, compressed)]
    return compare_records(*records, history, base_history=base_history)


def compare_records(
    base: RoutingRecord,
    compressed: RoutingRecord,
    history: Sequence[DropReport],
    *,
    base_history: Sequence[DropReport] = (),
) -> RoutingComparison:
    """The same from what `record_routing` kept, so that one base serves several comparisons.

    :raises ValueError: the history does not lead from one to the other, or they saw different tokens
    """
    kept = match_layouts(base.layout, compressed.layout, history, base_history)
    if base.tokens != compressed.tokens and compressed.traces:
        raise ValueError(
            f"The base saw {base.tokens} tokens, the compressed model {compressed.tokens}: run both on the same "
            "batches."
        )
    layers = {}
    for position, block in enumerate(kept.blocks):
        if block in kept.experts:
            experts = list(kept.experts[block])
            fidelity = routing_fidelity(
                base.traces[block], compressed.traces[position], experts, total=sum_over_ranks
            )
            layers[block] = LayerRouting(compressed_block=position, kept_experts=experts, routing=fidelity)
    return RoutingComparison(
        tokens=base.tokens,
        dropped_blocks=kept.dropped_blocks,
        dropped_layers=kept.dropped_layers,
        dropped_experts=_dropped_experts(kept),
        layers=layers,
        mean=_summary([layer.routing for layer in layers.values()]),
    )


def record_routing(
    model: PreTrainedModel, batches: Iterable[dict[str, Any]], *, max_tokens: int = MAX_TOKENS
) -> RoutingRecord:
    """Run a model once and keep what its routers choose.

    :param batches: keyword arguments of the model, ``input_ids`` [batch, sequence] among them
    :param max_tokens: stop after so many tokens (padding not counted); whole sequences, at least one
    :raises ValueError: there is no batch, or ``max_tokens`` is not positive
    :raises NotAnMoEError: the model has no MoE layer, and none was dropped
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: give at least 1.")
    chosen = _up_to(batches, max_tokens)
    if not chosen:
        raise ValueError("batches holds no sequence; give some text to run the models on.")
    layout = layout_of(model)
    if not layout.num_experts:
        return RoutingRecord(layout, sum(map(tokens_of, chosen)), {}, {})
    topology = find_topology(model)
    with _watch_widths(model, topology) as widths:
        traces = trace_routing(model, topology, chosen, quantized=True)
    counts = {len(trace.chosen) for trace in traces.values()}
    if len(counts) != 1:
        raise ValueError(
            f"The MoE layers of {type(model).__name__} saw different numbers of tokens: {counts}."
        )
    return RoutingRecord(layout, counts.pop(), traces, widths)


@contextlib.contextmanager
def _watch_widths(model: nn.Module, topology: Topology) -> Iterator[dict[int, int]]:
    """Block index -> length of the vectors that enter its experts: some families project them down first."""
    widths: dict[int, int] = {}

    def hook(index: int) -> Any:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            widths[index] = hidden_argument(args, kwargs).shape[-1]

        return before

    with contextlib.ExitStack() as stack:
        for index, moe in topology.moe_layers.items():
            experts = model.get_submodule(moe.experts)
            stack.callback(experts.register_forward_pre_hook(hook(index), with_kwargs=True).remove)
        yield widths


def _up_to(batches: Iterable[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The first batches that hold ``limit`` tokens; the last one without the sequences that would pass it."""
    taken: list[dict[str, Any]] = []
    seen = 0
    for batch in batches:
        rows = len(batch["input_ids"])
        while rows and seen + tokens_of(_rows(batch, rows)) > limit and (taken or rows > 1):
            rows -= 1
        if rows:
            taken.append(_rows(batch, rows))
            seen += tokens_of(taken[-1])
        if rows < len(batch["input_ids"]) or seen >= limit:
            break
    return taken


def _rows(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    every = len(batch["input_ids"])
    return {
        name: value[:rows]
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == every
        else value
        for name, value in batch.items()
    }


def _dropped_experts(kept: KeptParts) -> dict[int, list[int]]:
    gone = {
        block: sorted(set(range(kept.base.num_experts[block])) - set(experts))
        for block, experts in kept.experts.items()
    }
    return {block: experts for block, experts in gone.items() if experts}


def _summary(layers: Sequence[RoutingFidelity]) -> RoutingSummary | None:
    # Every layer saw the same tokens, so the mean over layers is the mean over layers and tokens.
    if not layers:
        return None

    def mean(name: str) -> float | None:
        values = [value for layer in layers if (value := getattr(layer, name)) is not None]
        return sum(values) / len(values) if values else None

    means = {
        name: mean(name)
        for name in (
            "top_k_overlap",
            "top_k_overlap_kept",
            "replaced",
            "router_kl",
            "load_change",
            "load_cv_before",
            "load_cv_after",
        )
    }
    return RoutingSummary(
        layers=len(layers),
        dead_before=sum(layer.dead_before for layer in layers),
        dead_after=sum(layer.dead_after for layer in layers),
        **means,
    )
