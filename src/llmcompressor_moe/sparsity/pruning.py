"""Drive upstream's SparseGPT or Wanda over chosen experts, each with a ratio of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.utils import align_module_device, update_offload_parameter
from llmcompressor.core import Event, State
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight
from torch import nn

from llmcompressor_moe.compat.llmcompressor.calibration import (
    forget_pruning,
    pruning_calibrated,
    pruning_saw_inputs,
    pruning_watches,
    set_pruning_ratio,
)

__all__ = ["ALGORITHMS", "Part", "UpstreamPruning", "linear_weights"]

# Name -> upstream's modifier.
ALGORITHMS: dict[str, type[SparsityModifierBase]] = {
    "sparsegpt": SparseGPTModifier,
    "wanda": WandaPruningModifier,
}

# Columns that SparseGPT works on at a time (its default); groups of an N:M mask must not straddle two of them.
_BLOCK_SIZE = 128


@dataclass
class Part:
    """What is pruned at one ratio: a routed expert, or a layer's shared experts.

    :param layer: block index
    :param expert: original index of the routed expert; None for shared experts
    :param modules: the modules whose Linears are pruned
    :param ratio: share of its weights that shall be zero; None while, or if, it is not decided
    :param weights: weights looked at after pruning
    :param zeros: how many of them are zero
    :param fallback: whether some of its Linears were pruned by magnitude
    """

    layer: int
    expert: int | None
    modules: Sequence[nn.Module]
    ratio: float | None = None
    weights: int = 0
    zeros: int = 0
    fallback: bool = False
    linears: list[nn.Linear] = field(default_factory=list)

    @property
    def measured(self) -> float | None:
        """Share of its weights that is zero; None before pruning."""
        return self.zeros / self.weights if self.weights else None


def linear_weights(modules: Sequence[nn.Module]) -> list[torch.Size]:
    """Shapes [out, in] of the Linears' weights in some modules."""
    return [
        linear.weight.shape
        for module in modules
        for linear in module.modules()
        if isinstance(linear, nn.Linear)
    ]


class UpstreamPruning:
    """One of upstream's pruning modifiers, inside of ours.

    It gets every event that ours gets. In between, each of its modules is given the ratio of its expert, modules
    that stay dense are taken from it, and so are modules whose inputs were all zero or none at all: without
    inputs SparseGPT would clear the whole weight and Wanda its first columns. Those are pruned by magnitude.

    :param algorithm: a key of `ALGORITHMS`
    :param mask_structure: ``0:0`` or ``N:M``
    """

    def __init__(self, algorithm: str, mask_structure: str) -> None:
        self._modifier_cls = ALGORITHMS[algorithm]
        self._mask_structure = mask_structure
        self._prune_n, self._prune_m = map(int, mask_structure.split(":"))
        self._inner: SparsityModifierBase | None = None
        self._part_of: dict[nn.Module, Part] = {}

    def start(self, state: State, event: Event, targets: Sequence[str], parts: Sequence[Part]) -> None:
        """Begin to watch the inputs of the parts' Linears.

        :param targets: paths, at this moment, of modules that hold the parts and no other Linear
        """
        settings: dict[str, Any] = {}
        if self._modifier_cls is SparseGPTModifier:
            settings["block_size"] = _BLOCK_SIZE - _BLOCK_SIZE % (self._prune_m or 1) or self._prune_m
        self._inner = self._modifier_cls(
            sparsity=0.0, mask_structure=self._mask_structure, targets=list(targets), **settings
        )
        self._inner.on_initialize(state)
        self._inner.on_calibration_start(state, event)
        for part in parts:
            part.linears = [
                m for module in part.modules for m in module.modules() if pruning_watches(self._inner, m)
            ]
            self._part_of |= dict.fromkeys(part.linears, part)

    def prune(self, state: State, event: Event, **kwargs: Any) -> None:
        """Prune what has been calibrated since the last time, at the parts' ratios."""
        calibrated = pruning_calibrated(self._inner)
        for module in calibrated:
            part = self._part_of[module]
            if not part.ratio:
                forget_pruning(self._inner, module)
            elif not pruning_saw_inputs(self._inner, module):
                forget_pruning(self._inner, module)
                self._by_magnitude(module, part)
            else:
                set_pruning_ratio(self._inner, module, part.ratio)
        self._inner.on_sequential_epoch_end(state, event, **kwargs)
        for module in calibrated:
            self._count(module)

    def end(self, state: State, event: Event, parts: Sequence[Part], **kwargs: Any) -> None:
        """Stop watching; prune what was never calibrated.

        :param parts: those that are still in the model
        """
        self._inner.on_calibration_end(state, event, **kwargs)
        for part in parts:
            for module in part.linears:
                if module in self._part_of and part.ratio is not None:
                    if part.ratio:
                        self._by_magnitude(module, part)
                    self._count(module)
        self._part_of = {}

    def finalize(self, state: State) -> None:
        """Let go of everything."""
        if self._inner is not None:
            self._inner.on_finalize(state)
            self._inner = None

    def _by_magnitude(self, module: nn.Linear, part: Part) -> None:
        """Wanda with inputs that are all alike."""
        with torch.no_grad(), align_module_device(module):
            alike = torch.ones(module.weight.shape[1], device=module.weight.device)
            pruned = sparsify_weight(module, {module: alike}, part.ratio, self._prune_n, self._prune_m)
        update_offload_parameter(module, "weight", pruned)
        part.fallback = True

    def _count(self, module: nn.Linear) -> None:
        part = self._part_of.pop(module)
        with align_module_device(module):
            part.weights += module.weight.numel()
            part.zeros += int((module.weight == 0).sum())
