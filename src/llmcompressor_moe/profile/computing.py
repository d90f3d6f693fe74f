"""The dtype that weights are computed in, which may be another one than they are stored in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import psutil
import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache.base import OffloadCache
from torch import nn

__all__ = ["ComputedModules", "available_memory", "computed_in", "fast_dtype", "stored_dtype"]

_HALF = (torch.bfloat16, torch.float16)
# Names in /proc/cpuinfo, x86 and ARM, of units that multiply matrices of that dtype.
_UNITS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}
_CPU_INFO = Path("/proc/cpuinfo")


def fast_dtype(model_dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype that a model is fastest computed in without loss: float32 for 16-bit models on a CPU that can only
    emulate them (there it is 2 to 20 times as fast), its own anywhere else.
    """
    if model_dtype not in _HALF or torch.device(device).type != "cpu":
        return model_dtype
    return model_dtype if _UNITS[model_dtype] & _cpu_features() else torch.float32


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter, wherever it is stored."""
    with disable_onloading():
        found = (value.dtype for value in model.parameters() if value.is_floating_point())
        return next(found, torch.get_default_dtype())


def available_memory(device: torch.device | str) -> int:
    """Bytes that can be allocated on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@functools.cache
def _cpu_features() -> frozenset[str]:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":") for line in lines)
    return next(
        (frozenset(words.split()) for name, _, words in found if name.strip() in ("flags", "Features")),
        frozenset(),
    )


class ComputedModules:
    """Modules whose tensors are onloaded, and cast from 16 bit, at their first use inside the context, and then
    stay so until it ends. Offloaded modules are not onloaded again at every use.

    What is written into the modules inside the context goes where they store it.
    """

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype | None) -> None:
        """
        :param modules: each for itself, without its children
        :param dtype: what bfloat16 and float16 tensors are cast to (never float8); None: nothing is cast
        """
        self._modules = [module for module in modules if _replaceable(module, dtype)]
        self._dtype = dtype
        self._own: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        for module in self._modules:
            attributes = module.__dict__
            for name in ("_parameters", "_buffers"):
                stored = attributes[name]
                if len(stored):
                    self._own.append((attributes, name, stored))
                    attributes[name] = _ComputedTensors(stored, self._dtype)

    def __exit__(self, *exc: object) -> None:
        for attributes, name, stored in self._own:
            attributes[name] = stored
        self._own.clear()

    def release(self) -> None:
        """Inside the context: let go of what was onloaded and cast; it is made again when it is used again."""
        for attributes, name, _ in self._own:
            attributes[name].release()


@contextlib.contextmanager
def computed_in(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """See `ComputedModules`."""
    with ComputedModules(modules, dtype):
        yield


class _ComputedTensors(MutableMapping):
    """Stands for a module's parameters or buffers."""

    def __init__(self, stored: MutableMapping[str, Any], dtype: torch.dtype | None) -> None:
        self._stored, self._dtype = stored, dtype
        self._made: dict[str, torch.Tensor | None] = {}

    def __getitem__(self, name: str) -> torch.Tensor | None:
        try:
            return self._made[name]
        except KeyError:
            value = self._made[name] = _computed(self._stored, name, self._dtype)
            return value

    def __setitem__(self, name: str, value: torch.Tensor | None) -> None:
        self._made.pop(name, None)
        self._stored[name] = value

    def __delitem__(self, name: str) -> None:
        self._made.pop(name, None)
        del self._stored[name]

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def release(self) -> None:
        self._made.clear()


def _computed(stored: MutableMapping[str, Any], name: str, dtype: torch.dtype | None) -> torch.Tensor | None:
    offloaded = stored.offloaded_values[name] if isinstance(stored, OffloadCache) else None
    if offloaded is not None and _is_cast(offloaded, dtype) and hasattr(stored, "onload_as"):
        return stored.onload_as(offloaded, dtype)
    value = stored[name]
    return value.detach().to(dtype) if value is not None and _is_cast(value, dtype) else value


def _is_cast(value: torch.Tensor, dtype: torch.dtype | None) -> bool:
    return dtype is not None and value.dtype in _HALF and value.dtype != dtype


def _replaceable(module: nn.Module, dtype: torch.dtype | None) -> bool:
    parameters = module._parameters
    if not isinstance(parameters, OffloadCache):
        return True
    device = torch.device(parameters.onload_device)
    if device.type == "cpu" or parameters.offload_device != parameters.onload_device:
        return True
    # A model spread over several accelerators: the forward of such a module moves its inputs to it, but only
    # while the module's own cache is in place.
    values = [*parameters.offloaded_values.values(), *module._buffers.offloaded_values.values()]
    return any(value is not None and _is_cast(value, dtype) for value in values)
