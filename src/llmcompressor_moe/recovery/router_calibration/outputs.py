"""What a model says: recorded before compression, compared with and learnt from after it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from transformers import PreTrainedModel

from llmcompressor_moe.compat.llmcompressor.lm_head import lm_head_in_place
from llmcompressor_moe.profile.forward import batch_mask, forwards, sum_over_ranks, to_device
from llmcompressor_moe.profile.observing import Observer, RoutedObserver, attached, observe_batches
from llmcompressor_moe.recovery.fake_quantization import gradients_through_rounding
from llmcompressor_moe.recovery.losses import TopLogits, top_logits_kl
from llmcompressor_moe.topology import Topology

__all__ = ["OutputRecord", "learning", "mean_divergence", "output_loss", "record_outputs"]

# Of a vocabulary of 150,000, a batch of 2048 tokens keeps 1.5 MB instead of 600.
_TOP = 128


@dataclass
class OutputRecord:
    """A model's most probable next tokens on some batches, on the CPU.

    :param batches: the batches
    :param tops: for each, [tokens that are no padding, k]
    """

    batches: Sequence[dict[str, Any]]
    tops: list[TopLogits]


def record_outputs(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Any]],
    observers: Collection[Observer] = (),
) -> OutputRecord:
    """Run a model that is not offloaded over batches and keep what it would say next.

    :param observers: these watch
    """
    tops: list[TopLogits] = []

    def keep(index: int, logits: torch.Tensor) -> None:
        tops.append(_top(_tokens(logits, batches[index])))

    observe_batches(model, observers, batches, "Recording the output", on_logits=keep)
    return OutputRecord(batches, tops)


def mean_divergence(
    model: PreTrainedModel,
    record: OutputRecord,
    observers: Collection[Observer] = (),
    *,
    quantized: bool = True,
) -> float:
    """KL(recorded || model) of the next token in nats, the mean over all tokens of all ranks; see
    `recovery.losses.top_logits_kl`.

    :param observers: these watch
    """
    sums = torch.zeros(2, dtype=torch.float64)

    def compare(index: int, logits: torch.Tensor) -> None:
        flat = _tokens(logits, record.batches[index])
        sums[0] += float(top_logits_kl(flat, _on(record.tops[index], flat.device))) * len(flat)
        sums[1] += len(flat)

    observe_batches(
        model, observers, record.batches, "Judging the output", quantized=quantized, on_logits=compare
    )
    total, tokens = sum_over_ranks(sums).tolist()
    return total / max(tokens, 1.0)


@contextlib.contextmanager
def learning(model: PreTrainedModel, topology: Topology) -> Iterator[None]:
    """Context for `output_loss`: the model runs as it will be served, and gradients pass its rounding."""
    with _routed(model, topology, quantized=True), gradients_through_rounding(model):
        yield


def output_loss(model: PreTrainedModel, record: OutputRecord, index: int) -> torch.Tensor:
    """The divergence on one recorded batch, inside `learning`; with a graph where gradients are enabled."""
    logits = _logits(model, record.batches[index])
    return top_logits_kl(logits, _on(record.tops[index], logits.device))


@contextlib.contextmanager
def _routed(model: PreTrainedModel, topology: Topology, *, quantized: bool = False) -> Iterator[None]:
    """Experts run routed tokens only, where upstream's would run all of them during calibration."""
    routed = [RoutedObserver(model, block) for block in topology.blocks if block.moe is not None]
    with attached(routed), forwards(model, quantized=quantized), lm_head_in_place(model):
        yield


def _logits(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """[tokens that are no padding, vocabulary]."""
    return _tokens(model(**to_device(batch, get_execution_device(model))).logits, batch)


def _tokens(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """[tokens that are no padding, vocabulary]."""
    flat, mask = logits.flatten(0, -2), batch_mask(batch)
    return flat if mask is None else flat[mask.reshape(-1).to(flat.device)]


def _top(logits: torch.Tensor) -> TopLogits:
    values, indices = logits.topk(min(_TOP, logits.shape[-1]), dim=-1)
    return TopLogits(values.cpu(), indices.cpu(), logits.float().logsumexp(dim=-1).cpu())


def _on(top: TopLogits, device: torch.device) -> TopLogits:
    return TopLogits(top.values.to(device), top.indices.to(device), top.log_normalizer.to(device))
