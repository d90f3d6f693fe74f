"""The figures that limits are about, of a model before and after it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmcompressor_moe.demo import token_rows
from llmcompressor_moe.evaluation.agreement import (
    Agreement,
    BaseLogits,
    answers,
    recorded_base,
    text_quality_of,
)
from llmcompressor_moe.evaluation.routing import (
    RoutingComparison,
    RoutingRecord,
    compare_records,
    record_routing,
)
from llmcompressor_moe.evaluation.text import TextQuality, require_bytes
from llmcompressor_moe.evaluation.windows import choose_windows, tokenized
from llmcompressor_moe.limits import Figures
from llmcompressor_moe.report import DropReport

__all__ = ["BaseFigures", "Measured", "check_text", "figures", "figures_of", "measured", "recorded_figures"]


@dataclass(frozen=True)
class BaseFigures:
    """What is kept of a model before it changes."""

    tokenizer: PreTrainedTokenizerBase
    texts: list[str]
    text: TextQuality
    asked: bool
    logits: BaseLogits
    routing: RoutingRecord


def check_text(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    length: int | None = None,
    stride: int | None = None,
) -> None:
    """Refuse a text or windows that a model cannot be measured on, from its config.

    :raises ValueError: see `text.text_quality`; or the text is shorter than one window
    """
    documents = tokenized(tokenizer, texts)
    length_used, *_ = choose_windows(config, documents, length, stride)
    require_bytes(documents)
    _routing_batches(tokenizer, texts, length_used, asked=length is not None)


@contextlib.contextmanager
def recorded_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    length: int | None = None,
    stride: int | None = None,
    *,
    batch_size: int = 1,
    routing_tokens: int = 8192,
) -> Iterator[BaseFigures]:
    """Measure a model and keep what it is compared with later, in a temporary file while the context is open.

    It runs block by block, once over all windows and once for its routers; other modifiers' hooks stay silent.

    :raises ValueError: see `text.text_quality`
    """
    with contextlib.ExitStack() as stack:
        logits = stack.enter_context(
            recorded_base(model, tokenizer, texts, length, stride, batch_size=batch_size)
        )
        text = text_quality_of(logits, logits.losses)
        routing = record_routing(
            model,
            _routing_batches(tokenizer, texts, logits.length, asked=length is not None),
            max_tokens=routing_tokens,
        )
        # Whoever is done with the model shall not find it held here.
        del model
        yield BaseFigures(tokenizer, texts, text, length is not None, logits, routing)


@dataclass(frozen=True)
class Measured:
    """A model beside the one that was recorded."""

    text: TextQuality
    agreement: Agreement
    routing: RoutingRecord


def measured(model: PreTrainedModel, base: BaseFigures) -> Measured:
    """Let a model answer what its base answered.

    :raises FloatingPointError: it gives NaN or infinite logits
    """
    compared, losses = answers(base.logits, model)
    return Measured(
        text=text_quality_of(base.logits, losses),
        agreement=compared,
        routing=record_routing(
            model,
            _routing_batches(base.tokenizer, base.texts, base.logits.length, asked=base.asked),
            max_tokens=base.routing.tokens,
        ),
    )


def figures_of(model: PreTrainedModel, base: BaseFigures, history: Sequence[DropReport]) -> Figures:
    """The same model after it has changed.

    :param history: what was dropped from it since
    :raises FloatingPointError: it gives NaN or infinite logits
    """
    found = measured(model, base)
    return figures(base, found, compare_records(base.routing, found.routing, history))


def figures(base: BaseFigures, found: Measured, routing: RoutingComparison) -> Figures:
    """What limits look at, from what was measured."""
    return Figures(
        perplexity_increase=found.text.perplexity / base.text.perplexity - 1,
        kl=found.agreement.mean_kl,
        top1_agreement=found.agreement.top1_agreement,
        routing_overlap=routing.mean.top_k_overlap_kept if routing.mean else None,
        replaced=routing.mean.replaced if routing.mean else None,
    )


def _routing_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, *, asked: bool
) -> list[dict[str, torch.Tensor]]:
    """Windows of running text for routers to be compared on.

    :param asked: whether somebody wants this length; otherwise a shorter text is one window
    :raises ValueError: the text is shorter than one window
    """
    rows = token_rows(tokenizer, list(texts), length)
    if not rows and not asked:
        rows = [[token for row in token_rows(tokenizer, list(texts), 1) for token in row]]
    if not rows:
        raise ValueError(
            f"the text holds less than one window of {length} tokens; give more text or a smaller length."
        )
    return [
        {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        for row in rows
    ]
