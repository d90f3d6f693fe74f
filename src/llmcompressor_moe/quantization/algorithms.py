"""Drive upstream's GPTQ, AWQ and round-to-nearest modifiers from inside another modifier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
)
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.calibration import update_qparams
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQMapping
from torch import nn

from llmcompressor_moe.compat.llmcompressor.awq import each_in_its_own_scheme
from llmcompressor_moe.compat.llmcompressor.calibration import forget_gptq, gptq_traces
from llmcompressor_moe.profile.forward import sum_over_ranks

__all__ = ["ALGORITHMS", "UpstreamQuantization", "needs_data"]

ALGORITHMS = ("rtn", "gptq", "awq")


def needs_data(algorithm: str) -> bool:
    """Whether upstream's algorithm calibrates weights on data."""
    return algorithm != "rtn"


class UpstreamQuantization:
    """Upstream's modifiers for one plan; hand it every event of the modifier that owns it.

    Modules that no token reached would keep uninitialised scales; they get round-to-nearest scales, and
    static input scales of the same projection in their neighbours. `notes` says how many.

    :param groups: one scheme per group, targets filled
    :param mappings: for AWQ: what may be smoothed
    :param kv_cache: how keys and values are quantized; None: not at all
    """

    def __init__(
        self,
        algorithm: str,
        groups: Mapping[str, QuantizationScheme],
        mappings: list[AWQMapping] | None = None,
        kv_cache: QuantizationArgs | None = None,
    ) -> None:
        self.notes: list[str] = []
        self._algorithm = algorithm
        self._starved: dict[str, int] = defaultdict(int)
        config = {name: scheme.model_copy(deep=True) for name, scheme in groups.items()}
        self._modifiers: list[Modifier] = []
        if not groups and kv_cache is None:
            return
        upstream = GPTQModifier if algorithm == "gptq" and groups else QuantizationModifier
        self._modifiers = [upstream(config_groups=config, kv_cache_scheme=kv_cache)]
        if algorithm == "awq" and mappings:
            by_tensor = any(s.weights.strategy == QuantizationStrategy.TENSOR for s in config.values())
            self._modifiers.insert(0, AWQModifier(mappings=mappings, duo_scaling=not by_tensor))

    def start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Attach schemes and hooks: upstream's initialize, then its calibration start."""
        for modifier in reversed(self._modifiers):
            # AWQ looks at the schemes, so they are attached before it starts.
            modifier.on_initialize(state, **kwargs)
        for modifier in self._modifiers:
            modifier.on_calibration_start(state, event, **kwargs)

    def sequential_epoch_end(
        self, state: State, event: Event, modules: Iterable[nn.Module], **kwargs: Any
    ) -> None:
        """Quantize the modules of one part of the model."""
        modules = list(modules)
        ours = [module for module in modules if is_module_quantized(module)]
        unseen_inputs = [module for module in ours if _input_unseen(module)]
        gptq = [modifier for modifier in self._modifiers if isinstance(modifier, GPTQModifier)]
        starved = _take_out_starved(gptq[0]) if gptq else []
        with each_in_its_own_scheme():
            for modifier in self._modifiers:
                modifier.on_sequential_epoch_end(state, event, modules=modules, **kwargs)
        update_qparams(starved, "weight")
        self._starved["weights rounded to nearest: no token reached them"] += len(starved)
        filled = _borrow_input_scales(unseen_inputs, ours)
        self._starved["input scales taken from the other experts: no token reached them"] += filled

    def end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Remove hooks and observers, leave quantization on.

        :raises FloatingPointError: a scale is NaN or infinite
        """
        for modifier in self._modifiers:
            modifier.on_calibration_end(state, event, **kwargs)
            modifier.ended_ = True
        self.notes = [f"{count} modules: {what}" for what, count in self._starved.items() if count]
        _check_scales(state.model, self._algorithm)

    def finalize(self, state: State, **kwargs: Any) -> None:
        """Upstream's finalize."""
        for modifier in self._modifiers:
            modifier.on_finalize(state, **kwargs)


def _take_out_starved(gptq: GPTQModifier) -> list[nn.Module]:
    """Modules that GPTQ has seen no token of; it would set their weights to zero."""
    found = gptq_traces(gptq)
    if not found:
        return []
    traces = sum_over_ranks(torch.stack(list(found.values()))).tolist()
    starved = [module for module, trace in zip(found, traces, strict=True) if trace == 0]
    forget_gptq(gptq, starved)
    return starved


def _input_unseen(module: nn.Module) -> bool:
    observer = getattr(module, "input_observer", None)
    return observer is not None and not observer.has_statistics


def _borrow_input_scales(unseen: list[nn.Module], modules: list[nn.Module]) -> int:
    """Give modules without input statistics the widest range among seen ones of the same shape."""
    filled = 0
    for name, widest in (("input_scale", torch.maximum), ("input_global_scale", torch.minimum)):
        wanting = [module for module in unseen if hasattr(module, name)]
        donors = [m for m in modules if hasattr(m, name) and all(m is not other for other in unseen)]
        for module in wanting:
            alike = [donor for donor in donors if donor.weight.shape == module.weight.shape]
            if not alike:
                continue
            value = getattr(alike[0], name).clone()
            for donor in alike[1:]:
                value = widest(value, getattr(donor, name).to(value.device))
            update_offload_parameter(module, name, value)
            if hasattr(module, "input_zero_point") and name == "input_scale":
                update_offload_parameter(module, "input_zero_point", alike[0].input_zero_point)
            filled += 1
    return filled


def _check_scales(model: nn.Module, algorithm: str) -> None:
    way_out = "" if algorithm == "rtn" else ", or use algorithm='rtn'"
    for name, module in model.named_modules():
        # Modules of a modifier that comes later have schemes and scales by now, but nothing in them.
        if getattr(module, "quantization_status", None) != QuantizationStatus.FROZEN:
            continue
        for leaf in ("weight_scale", "weight_global_scale", "input_scale", "input_global_scale"):
            scale = getattr(module, leaf, None)
            if scale is not None and not bool(torch.isfinite(scale.float()).all()):
                raise FloatingPointError(
                    f"{name}.{leaf} is NaN or infinite after quantization; nothing is saved. Check the weights "
                    f"and the calibration data{way_out}."
                )
