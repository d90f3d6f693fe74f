"""Run a model over calibration batches once, whether it fits in memory or is offloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import get_execution_device, set_onload_device
from compressed_tensors.quantization import QuantizationStatus, disable_quantization, enable_quantization
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import (
    DisableQuantization,
    disable_cache,
    disable_hf_kernels,
    eval_context,
)
from torch import distributed as dist
from transformers import PreTrainedModel

from llmcompressor_moe.compat.compressed_tensors import is_offloaded
from llmcompressor_moe.compat.llmcompressor.lm_head import lm_head_in_place
from llmcompressor_moe.profile.lockstep import Fork, Snapshot, run_lockstep

__all__ = [
    "batch_mask",
    "forwards",
    "quantized_as_calibrated",
    "run_batches",
    "sum_over_ranks",
    "to_device",
    "tokens_of",
]

Batch = dict[str, Any]
BatchStart = Callable[[int, Batch], None]


def batch_mask(batch: Batch) -> torch.Tensor | None:
    """Boolean [batch, sequence]: True for tokens, False for padding; None when nothing is padded."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.bool()


def tokens_of(batch: Batch) -> int:
    """Tokens of a batch, padding left out."""
    mask = batch_mask(batch)
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def run_batches(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    on_batch: BatchStart | None,
    description: str | None,
    *,
    quantized: bool = False,
    on_wave: Callable[[Sequence[int]], None] | None = None,
    on_logits: Callable[[int, torch.Tensor], None] | None = None,
    on_block_done: Callable[[int, Snapshot], None] | None = None,
    start_block: int = 0,
    resume: Mapping[int, Any] | None = None,
    forks: Sequence[Fork] = (),
    share: float = 1.0,
) -> None:
    """One forward pass over ``batches``, block by block, that stops before the LM head; see `lockstep`.

    Hooks of other modifiers stay silent. Options are those of `options.run_options`.

    :param on_batch: called with a batch's index and the batch before the model, or each of its parts, sees it
    :param description: beside the progress bar; None: no bar
    :param quantized: run modules that have a scheme as they will be served, and not in full precision
    :param on_logits: called with a batch's index and its logits; with it the LM head runs
    :param on_wave: this and the others: see `lockstep.run_lockstep`
    """
    if is_offloaded(model):
        set_onload_device(model, get_main_device())
    device = get_execution_device(model)
    head = lm_head_in_place(model) if on_logits is not None else contextlib.nullcontext()
    with forwards(model, quantized=quantized), head:
        run_lockstep(
            model,
            [to_device(batch, device) for batch in batches],
            description=description,
            on_batch=on_batch,
            on_wave=on_wave,
            on_logits=on_logits,
            on_block_done=on_block_done,
            start_block=start_block,
            resume=resume,
            forks=forks,
            share=share,
        )


def _quantize_if_calibrated(module: torch.nn.Module) -> None:
    """Modules of a modifier that comes later in the recipe have a scheme by now, but no scales."""
    status = getattr(module, "quantization_status", None)
    # Frozen when calibrated, compressed when loaded.
    calibrated = status is not None and status >= QuantizationStatus.FROZEN
    (enable_quantization if calibrated else disable_quantization)(module)


@contextlib.contextmanager
def quantized_as_calibrated(model: torch.nn.Module) -> Iterator[None]:
    """Let every module run as it will be served: rounded where its scales are known."""
    states = {module: getattr(module, "quantization_enabled", None) for module in model.modules()}
    model.apply(_quantize_if_calibrated)
    try:
        yield
    finally:
        for module, enabled in states.items():
            if enabled is not None:
                module.quantization_enabled = enabled


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum an accumulator over all ranks; every rank gets the same numbers and so makes the same plan."""
    if not is_distributed():
        return values
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )
    # A copy: the sum of an accumulator on the CPU must not change the accumulator itself.
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


@contextlib.contextmanager
def forwards(model: PreTrainedModel, *, quantized: bool = False) -> Iterator[None]:
    """Context to call a model in while a recipe runs: other modifiers' hooks are silent, and nothing is learnt or
    cached.

    :param quantized: run modules that have a scheme as they will be served, and not in full precision
    """
    with (
        HooksMixin.disable_hooks(),
        quantized_as_calibrated(model) if quantized else DisableQuantization(model),
        torch.no_grad(),
        disable_cache(model),
        eval_context(model),
        disable_hf_kernels(model),
    ):
        yield


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
