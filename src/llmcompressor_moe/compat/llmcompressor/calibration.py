"""What llm-compressor's modifiers have seen of the modules that they calibrate.

They keep it in private dictionaries by module and take for granted that every module has seen tokens, which
experts have not: without inputs GPTQ and SparseGPT clear a whole weight, Wanda its first columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from torch import nn

__all__ = [
    "forget_gptq",
    "forget_pruning",
    "gptq_traces",
    "pruning_calibrated",
    "pruning_saw_inputs",
    "pruning_watches",
    "set_pruning_ratio",
]

_STATISTICS: tuple[tuple[type[SparsityModifierBase], str], ...] = (
    (SparseGPTModifier, "_hessians"),
    (WandaPruningModifier, "_row_scalars"),
)


def gptq_traces(gptq: GPTQModifier) -> dict[nn.Module, torch.Tensor]:
    """Module -> trace of its Hessian, fp64 on the CPU, since the last part of the model was quantized.

    GPTQ's hooks run for modules without tokens, too, on nothing, and leave a Hessian of zeros.
    """
    return {
        module: hessian.diagonal().sum(dtype=torch.float64).cpu()
        for module, hessian in gptq._hessians.items()
    }


def forget_gptq(gptq: GPTQModifier, modules: Iterable[nn.Module]) -> None:
    """Take modules from what GPTQ quantizes next."""
    for module in modules:
        del gptq._hessians[module], gptq._num_samples[module]


def pruning_watches(pruning: SparsityModifierBase, module: nn.Module) -> bool:
    """Whether a module is among those that SparseGPT or Wanda prunes."""
    return module in pruning._module_names


def pruning_calibrated(pruning: SparsityModifierBase) -> list[nn.Module]:
    """Modules that SparseGPT or Wanda prunes next."""
    return list(pruning._num_samples)


def pruning_saw_inputs(pruning: SparsityModifierBase, module: nn.Module) -> bool:
    """Whether any input of a calibrated module was not zero."""
    return bool(_statistics(pruning)[module].any())


def forget_pruning(pruning: SparsityModifierBase, module: nn.Module) -> None:
    """Take a module from what SparseGPT or Wanda prunes next."""
    del pruning._num_samples[module], _statistics(pruning)[module]


def set_pruning_ratio(pruning: SparsityModifierBase, module: nn.Module, ratio: float) -> None:
    """The share of a module's weights that SparseGPT or Wanda clears; its recipe knows one per block."""
    pruning._module_sparsities[module] = ratio


def _statistics(pruning: SparsityModifierBase) -> dict[nn.Module, torch.Tensor]:
    return getattr(pruning, next(name for cls, name in _STATISTICS if isinstance(pruning, cls)))
