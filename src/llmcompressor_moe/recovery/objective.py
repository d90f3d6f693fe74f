"""The loss of a student on a batch: its parts, weighted and added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmcompressor_moe.recovery import losses
from llmcompressor_moe.recovery.adapters import inner_model, student_topology
from llmcompressor_moe.recovery.alignment import Alignment
from llmcompressor_moe.recovery.teacher import TeacherSignals, model_inputs
from llmcompressor_moe.recovery.watching import Seen, Watcher
from llmcompressor_moe.recovery.weights import LossWeights

__all__ = ["LossParts", "LossWeights", "Objective"]


@dataclass(frozen=True)
class LossParts:
    """One batch.

    :param total: what to call ``backward`` on: the weighted sum
    :param parts: loss -> its value before weighting, without gradient; only those that count
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


class Objective:
    """Runs a student on a batch and compares it with the teacher.

    :param alignment: needed for router_kl, expert_output and hidden
    :raises ValueError: ``alignment`` is needed and None, or has no MoE layers though those are compared
    """

    def __init__(self, weights: LossWeights, alignment: Alignment | None = None) -> None:
        weights.check_alignment(alignment)
        self.weights = weights
        self.alignment = alignment
        self._watcher: Watcher | None = None

    def __call__(
        self, student: nn.Module, batch: Mapping[str, Any], signals: TeacherSignals | None = None
    ) -> LossParts:
        """Loss of one batch.

        Padding (``attention_mask`` 0) and labels of -100 do not count. Predictions are compared where the next
        token counts, everything inside the model at every token that is no padding.

        :param student: wrapped or not
        :param batch: ``input_ids`` [batch, sequence] and other arguments of the model; ``labels`` as in
            `losses.next_token`, the input itself where there are none
        :param signals: what the teacher says about the batch; None where no loss needs a teacher
        :raises ValueError: ``signals`` lacks what is needed, or the student has not what is compared
        """
        watcher = self._watch(student)
        with watcher.watching() as seen:
            logits = student(**model_inputs(batch), use_cache=False).logits
        computed = {
            name: self._loss(name, logits, batch, signals or TeacherSignals(), seen)
            for name in self.weights.used
        }
        total = sum(
            (getattr(self.weights, name) * value for name, value in computed.items()), logits.new_zeros(())
        )
        return LossParts(total, {name: value.detach() for name, value in computed.items()})

    def _watch(self, student: nn.Module) -> Watcher:
        inner = inner_model(student)
        if self._watcher is None or self._watcher.model is not inner:
            weights, blocks, layers = self.weights, (), ()
            if self.alignment is not None:
                blocks, layers = tuple(self.alignment.blocks), tuple(self.alignment.layers)
            balanced = tuple(student_topology(inner).moe_layers) if weights.load_balancing else ()
            if weights.load_balancing and not balanced:
                raise ValueError(
                    f"load_balancing needs MoE layers, and {type(inner).__name__} has none; give it the weight 0."
                )
            self._watcher = Watcher(
                inner,
                routers={*(layers if weights.router_kl else ()), *balanced},
                expert_outputs=layers if weights.expert_output else (),
                hidden=blocks if weights.hidden else (),
            )
        return self._watcher

    def _loss(
        self,
        name: str,
        logits: torch.Tensor,
        batch: Mapping[str, Any],
        signals: TeacherSignals,
        seen: Seen,
    ) -> torch.Tensor:
        """One loss, before weighting, on the device of the logits."""
        compute: dict[str, Callable[[], torch.Tensor]] = {
            "next_token": lambda: losses.next_token(logits, _labels(batch, logits.device)),
            "logits_kl": lambda: self._logits_kl(logits, batch, signals),
            "router_kl": lambda: self._router_kl(batch, signals, seen, logits.device),
            "expert_output": lambda: _matched(
                {student: teacher for student, (teacher, _) in self.alignment.layers.items()},
                seen.expert_outputs,
                signals.expert_outputs,
                batch,
                logits.device,
            ),
            "hidden": lambda: _matched(
                self.alignment.blocks, seen.hidden, signals.hidden, batch, logits.device
            ),
            "load_balancing": lambda: self._load_balancing(batch, seen, logits.device),
        }
        return compute[name]()

    def _logits_kl(
        self, logits: torch.Tensor, batch: Mapping[str, Any], signals: TeacherSignals
    ) -> torch.Tensor:
        mask = losses.predicting(_labels(batch, logits.device))
        temperature = self.weights.temperature
        if signals.logits is not None:
            return losses.logits_kl(logits, signals.logits.to(logits.device), mask, temperature)
        if signals.top is None:
            raise ValueError(
                "logits_kl needs the teacher's logits, all or the highest, and signals has neither."
            )
        return losses.top_logits_kl(logits, signals.top.to(logits.device), mask, temperature)

    def _router_kl(
        self, batch: Mapping[str, Any], signals: TeacherSignals, seen: Seen, device: torch.device
    ) -> torch.Tensor:
        def of_layer(student: int, teacher: int, kept: tuple[int, ...]) -> torch.Tensor:
            answer = seen.router_logits[student]
            target = _signal(signals.router_logits, teacher, "router_logits").to(answer.device)
            return losses.router_kl(target, answer, kept, _tokens(batch, answer.device)).to(device)

        layers = self.alignment.layers.items()
        return _mean(of_layer(student, teacher, kept) for student, (teacher, kept) in layers)

    def _load_balancing(self, batch: Mapping[str, Any], seen: Seen, device: torch.device) -> torch.Tensor:
        top_k = self._watcher.top_k
        return _mean(
            losses.load_balancing(scores, top_k[index], _tokens(batch, scores.device)).to(device)
            for index, scores in seen.router_logits.items()
        )


def _matched(
    pairs: Mapping[int, int],
    students: Mapping[int, torch.Tensor],
    teachers: Mapping[int, torch.Tensor],
    batch: Mapping[str, Any],
    device: torch.device,
) -> torch.Tensor:
    """Mean over pairs (student's block -> teacher's) of `losses.matching`, token by token."""
    tokens = batch["input_ids"].numel()

    def of_pair(student: int, teacher: int) -> torch.Tensor:
        # Some families keep several residual streams: a token's vector is all of them.
        answer = students[student].reshape(tokens, -1)
        target = _signal(teachers, teacher, "outputs").to(answer.device).reshape(tokens, -1)
        return losses.matching(answer, target, _tokens(batch, answer.device)).to(device)

    return _mean(of_pair(*pair) for pair in pairs.items())


def _signal(signals: Mapping[int, torch.Tensor], block: int, what: str) -> torch.Tensor:
    if block not in signals:
        raise ValueError(
            f"the teacher's signals have no {what} of block {block}: make the teacher with the same weights and "
            "alignment as the objective."
        )
    return signals[block]


def _labels(batch: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """Token ids to predict, -100 where none is."""
    labels = batch.get("labels", batch["input_ids"]).to(device)
    mask = _mask(batch)
    return labels if mask is None else labels.masked_fill(~mask.to(device), losses.IGNORED)


def _tokens(batch: Mapping[str, Any], device: torch.device) -> torch.Tensor | None:
    """Boolean [batch * sequence], False for padding; None where there is none to be known of."""
    mask = _mask(batch)
    return None if mask is None else mask.reshape(-1).to(device)


def _mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.ndim == 2 else None


def _mean(values: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(values)).mean()
