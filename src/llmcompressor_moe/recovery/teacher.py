"""What the teacher says about a batch: asked now, or kept on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from llmcompressor_moe.recovery.alignment import Alignment
from llmcompressor_moe.recovery.losses import TopLogits
from llmcompressor_moe.recovery.watching import Watcher
from llmcompressor_moe.recovery.weights import LossWeights

__all__ = ["CachedTeacher", "LiveTeacher", "Teacher", "TeacherSignals", "model_inputs"]

# What a batch says to losses and caches, not to a model.
_NOT_FOR_MODELS = ("labels", "row")


@dataclass(frozen=True)
class TeacherSignals:
    """What a student is held against. Indices are the teacher's blocks.

    :param logits: [batch, sequence, vocabulary]; None where they are not needed, or only ``top`` is known
    :param top: the highest of them
    :param router_logits: see `watching.Seen`, and so the rest
    """

    logits: torch.Tensor | None = None
    top: TopLogits | None = None
    router_logits: dict[int, torch.Tensor] = field(default_factory=dict)
    expert_outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """Something that says what a teacher says."""

    def signals(self, batch: Mapping[str, Any]) -> TeacherSignals:
        """About one batch.

        :param batch: keyword arguments of a model, with or without ``labels`` and ``row`` (index of each row)
        """


class _Top(Protocol):
    def top(self, rows: torch.Tensor) -> TopLogits: ...


def model_inputs(batch: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """A batch without what is no argument of a model's forward.

    :param device: where tensors go; None: they stay
    """
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) and device is not None else value
        for name, value in batch.items()
        if name not in _NOT_FOR_MODELS
    }


class LiveTeacher:
    """A model in memory. It is put into eval mode, and its parameters no longer train.

    :param weights: what is needed of it
    :param alignment: needed for router_kl, expert_output and hidden
    :raises ValueError: ``alignment`` is needed and None, or names parts that the model has not
    """

    def __init__(
        self, model: PreTrainedModel, weights: LossWeights, alignment: Alignment | None = None
    ) -> None:
        weights.check_alignment(alignment)
        self._model = model.eval().requires_grad_(False)
        self._logits = weights.logits_kl > 0
        layers: Collection[int] = (
            () if alignment is None else {block for block, _ in alignment.layers.values()}
        )
        blocks: Collection[int] = () if alignment is None else set(alignment.blocks.values())
        self._watcher = Watcher(
            model,
            routers=layers if weights.router_kl else (),
            expert_outputs=layers if weights.expert_output else (),
            hidden=blocks if weights.hidden else (),
        )

    @torch.no_grad()
    def signals(self, batch: Mapping[str, Any]) -> TeacherSignals:
        """See `Teacher`; on the teacher's device."""
        with self._watcher.watching() as seen:
            output = self._model(**model_inputs(batch, self._model.device), use_cache=False)
        return TeacherSignals(
            logits=output.logits if self._logits else None,
            router_logits=seen.router_logits,
            expert_outputs=seen.expert_outputs,
            hidden=seen.hidden,
        )


class CachedTeacher:
    """Top logits on disk.

    :param cache: see `cache.open_cache`
    """

    def __init__(self, cache: _Top) -> None:
        self._cache = cache

    def signals(self, batch: Mapping[str, Any]) -> TeacherSignals:
        """See `Teacher`; ``row`` must be in the batch. On the CPU."""
        return TeacherSignals(top=self._cache.top(batch["row"]))
