"""Run a model over calibration batches once, whether it fits in memory or is offloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import disable_offloading, get_execution_device, set_onload_device
from compressed_tensors.quantization import QuantizationStatus, disable_quantization, enable_quantization
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import (
    DisableQuantization,
    calibration_forward_context,
    disable_cache,
    disable_hf_kernels,
    disable_lm_head,
    eval_context,
)
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel

from llmcompressor_moe.compat.compressed_tensors import is_offloaded

__all__ = [
    "batch_mask",
    "forwards",
    "quantized_as_calibrated",
    "run_batches",
    "run_once",
    "sum_over_ranks",
    "to_device",
]

Batch = dict[str, Any]
BatchStart = Callable[[int, Batch], None]

# Functions that are called as they are and not traced (upstream's list).
_TRACING_IGNORE = [
    "_update_causal_mask",
    "create_causal_mask",
    "_update_mamba_mask",
    "make_causal_mask",
    "get_causal_mask",
    "mask_interface",
    "mask_function",
    "_prepare_4d_causal_attention_mask",
    "_prepare_fsmt_decoder_inputs",
    "_prepare_4d_causal_attention_mask_with_cache_position",
    "_update_linear_attn_mask",
    "project_per_layer_inputs",
    "_apply_attn_res",
]


def batch_mask(batch: Batch) -> torch.Tensor | None:
    """Boolean [batch, sequence]: True for tokens, False for padding; None when nothing is padded."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.bool()


def run_batches(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    on_batch: BatchStart,
    description: str,
    *,
    quantized: bool = False,
) -> None:
    """One forward pass over ``batches`` that stops before the LM head.

    Hooks of other modifiers stay silent. An offloaded model is run block by block over all batches, so that
    its weights travel once and not once per batch.

    :param on_batch: called with a batch's index and the batch before the model, or each of its parts, sees it
    :param quantized: run modules that have a scheme as they will be served, and not in full precision
    """
    if is_offloaded(model):
        with HooksMixin.disable_hooks(), _quantization(model, quantized):
            _run_block_by_block(model, list(batches), on_batch, description)
        return
    with forwards(model, quantized=quantized), disable_lm_head(model):
        device = get_execution_device(model)
        for index, batch in enumerate(tqdm(batches, desc=description, leave=False)):
            batch = to_device(batch, device)
            on_batch(index, batch)
            model(**batch)


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


def run_once(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits of one batch, [batch, sequence, vocabulary], with other modifiers' hooks silent."""
    with forwards(model):
        return model(**to_device(batch, get_execution_device(model))).logits


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
        _quantization(model, quantized),
        torch.no_grad(),
        disable_cache(model),
        eval_context(model),
        disable_hf_kernels(model),
    ):
        yield


def _quantization(model: PreTrainedModel, quantized: bool) -> contextlib.AbstractContextManager[Any]:
    return quantized_as_calibrated(model) if quantized else DisableQuantization(model)


def _run_block_by_block(
    model: PreTrainedModel, batches: list[Batch], on_batch: BatchStart, description: str
) -> None:
    if not batches:
        return
    onload = get_main_device()
    set_onload_device(model, onload)
    subgraphs = trace_subgraphs(model, batches[0], infer_sequential_targets(model), _TRACING_IGNORE)
    for subgraph in subgraphs:
        _use_real_configs(subgraph, model)
    with calibration_forward_context(model):
        activations = IntermediatesCache.from_dataloader(batches, onload, torch.device("cpu"))
        for step, subgraph in enumerate(tqdm(subgraphs, desc=description, leave=False)):
            last = step == len(subgraphs) - 1
            with disable_offloading():
                for index, batch in enumerate(batches):
                    on_batch(index, batch)
                    outputs = subgraph.forward(model, **activations.fetch(index, subgraph.input_names))
                    if not last:
                        activations.update(index, outputs)
                        activations.delete(index, subgraph.consumed_names)


def _use_real_configs(subgraph: Subgraph, model: PreTrainedModel) -> None:
    """Give traced calls the model's own config objects.

    Tracing rebuilds a config that is an argument (of a mask function, say) from its fields and so loses which
    attention is in use: the mask is then left out, and eager attention without a mask sees the future.
    """
    configs = {
        type(config): config for config in (getattr(module, "config", None) for module in model.modules())
    }
    for node in subgraph.graph.nodes:
        if node.op == "call_function" and node.target in configs:
            node.target, node.kwargs = _returns(configs[node.target]), {}


def _returns(value: Any) -> Callable[[], Any]:
    def config() -> Any:
        return value

    config.__qualname__ = config.__name__ = f"config_{id(value)}"
    return config


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
