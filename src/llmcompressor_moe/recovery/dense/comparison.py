"""Is a start worth anything? Train from it for a few steps, and from others, and compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmcompressor_moe.evaluation.likelihood import mean_negative_log_likelihood
from llmcompressor_moe.recovery.losses import logits_kl

__all__ = ["Curve", "brief_training", "random_start"]


@dataclass(frozen=True)
class Curve:
    """Mean negative log-likelihood on held-out rows, in nats.

    :param steps: optimizer steps done
    :param nll: at each of them
    """

    steps: tuple[int, ...]
    nll: tuple[float, ...]

    @property
    def last(self) -> float:
        """After all steps."""
        return self.nll[-1]


def random_start(checkpoint: str | Path, seed: int = 0) -> PreTrainedModel:
    """A model of a checkpoint's architecture and dtype as its class initializes it, knowing nothing."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype)


def brief_training(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    heldout: Sequence[Sequence[int]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    every: int | None = None,
    seed: int = 0,
) -> Curve:
    """Distil with AdamW for some steps, all of them in fp32; the same arguments give every student the same data.

    A yardstick for starts, not a recovery: constant learning rate, KL to the teacher's logits only.

    :param student: trained in place, and in fp32 afterwards
    :param teacher: of the same vocabulary, on the student's device
    :param rows: token ids, all of one length
    :param heldout: rows to measure on
    :param every: steps between measurements; None: before and after only
    :param seed: of the order of the rows
    :raises ValueError: there is no row, or no step
    :raises FloatingPointError: the loss is NaN or infinite
    """
    if steps < 1 or not rows or not heldout:
        raise ValueError(
            f"steps={steps}, {len(rows)} rows and {len(heldout)} held-out rows: give at least 1 of each."
        )
    student.float().train()
    device = next(student.parameters()).device
    data, measured = torch.tensor(list(rows)), torch.tensor(list(heldout))
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    seen, values = [0], [mean_negative_log_likelihood(student, measured)]
    for step in range(1, steps + 1):
        batch = data[torch.randint(len(data), (batch_size,), generator=generator)].to(device)
        with torch.no_grad():
            target = teacher(input_ids=batch, use_cache=False).logits.float()
        loss = logits_kl(student(input_ids=batch, use_cache=False).logits, target)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the loss is {float(loss)} at step {step}; give a lower learning_rate.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step == steps or (every and step % every == 0):
            seen.append(step)
            values.append(mean_negative_log_likelihood(student, measured))
    return Curve(tuple(seen), tuple(values))
