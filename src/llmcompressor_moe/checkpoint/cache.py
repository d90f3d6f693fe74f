"""Parameters that are read from a checkpoint's files when they are used, and written to a scratch folder when
they change.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import offload_module
from compressed_tensors.offload.cache import DiskCache, OffloadCache
from compressed_tensors.offload.cache.dist_disk import DistributedDiskCache
from compressed_tensors.offload.utils import to_tensor
from safetensors.torch import save_file
from torch import nn

from llmcompressor_moe.checkpoint.sources import Source, Taken
from llmcompressor_moe.checkpoint.stored import StoredTensors
from llmcompressor_moe.compat.compressed_tensors import caches_of, scratch_file

__all__ = ["add", "forget", "read_ahead", "read_from", "source_of", "take"]


class _FromCheckpoint:
    """What an offload cache does with tensors that have a source.

    An offloaded tensor is a meta tensor. While it has a source, it is read from there. The first write gives it a
    file in the scratch folder, as upstream's disk cache does, and takes its source away. Small tensors that no
    file holds (rotary frequencies) stay in memory.
    """

    sources: ClassVar[dict[torch.Tensor, Source]] = {}
    resident: ClassVar[dict[torch.Tensor, torch.Tensor]] = {}

    def __init__(self, onload_device: torch.device, offload_device: str, offload_dir: Path) -> None:
        # Upstream resolves the folder for every module, which takes seconds where there are thousands of experts.
        OffloadCache.__init__(self, onload_device, offload_device)
        self.offload_dir = offload_dir

    def onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        return None if offloaded is None else self.onload_as(offloaded, offloaded.dtype)

    def onload_as(self, offloaded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor on the onload device, if it is floating point in the given dtype, read in one step."""
        if offloaded in self.resident:
            value = self.resident[offloaded].detach()
        elif (source := self.source(offloaded)) is not None:
            value = source.read(dtype)
        else:
            value = super().onload(offloaded).detach()
        return to_tensor(
            value.to(self.onload_device, dtype if value.is_floating_point() else None), offloaded
        )

    def offload(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is not None and (tensor in self.sources or tensor in self.resident):
            return tensor
        return super().offload(tensor)

    def update_offload(self, offloaded: torch.Tensor, data: torch.Tensor | None) -> None:
        # Tensors that are stored transposed are read as views, and what is computed from them is laid out alike.
        data = None if data is None else data.contiguous()
        if offloaded in self.resident:
            self.resident[offloaded].copy_(data)
        elif self.source(offloaded) is not None:
            self.write_first(offloaded, data.reshape_as(offloaded).to(offloaded.dtype))
            del self.sources[offloaded]
        else:
            super().update_offload(offloaded, data)

    def source(self, offloaded: torch.Tensor) -> Source | None:
        """Where a tensor is read from; None once it has changed."""
        return self.sources.get(offloaded)

    def write_first(self, offloaded: torch.Tensor, data: torch.Tensor) -> None:
        """Give a tensor that had a source a file in the scratch folder."""
        DiskCache.offload(self, data, offloaded)

    def __delitem__(self, key: str) -> None:
        offloaded = self.offloaded_values[key]
        if offloaded is None or offloaded in self.resident or self.source(offloaded) is not None:
            OffloadCache.__delitem__(self, key)
        else:
            super().__delitem__(key)


class CheckpointCache(_FromCheckpoint, DiskCache):
    """Reads from a checkpoint, writes to a scratch folder."""


class DistributedCheckpointCache(_FromCheckpoint, DistributedDiskCache):
    """The same on several ranks: each reads for itself; what one of them changes, all of them find in the scratch
    folder that they share.

    Upstream has one rank change a parameter and tells the others nothing but that it is done, since a disk cache's
    files are the same for all. So the file that a changed tensor gets has a name that every rank knows beforehand.
    """

    files: ClassVar[dict[torch.Tensor, Path]] = {}

    def source(self, offloaded: torch.Tensor) -> Source | None:
        """Where a tensor is read from; None once this or another rank has changed it."""
        if offloaded in self.sources and self.files[offloaded].exists():
            self._read_from_now_on(offloaded)
            del self.sources[offloaded]
        return self.sources.get(offloaded)

    def write_first(self, offloaded: torch.Tensor, data: torch.Tensor) -> None:
        """Give a tensor that had a source its file in the scratch folder, whole as soon as others see it."""
        file = self.files[offloaded]
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file({"weight": data.contiguous()}, unfinished)
        unfinished.replace(file)
        self._read_from_now_on(offloaded)

    def _read_from_now_on(self, offloaded: torch.Tensor) -> None:
        self.index[offloaded] = {
            "safetensors_file": str(self.files[offloaded]),
            "weight_name": "weight",
            "dtype": str(offloaded.dtype).removeprefix("torch."),
        }


def read_from(
    model: nn.Module, sources: Mapping[torch.Tensor, Source], device: torch.device, scratch: Path
) -> None:
    """Let all modules of a model read their tensors from sources; those without a source stay in memory.

    :param model: its parameters are meta tensors
    :param sources: meta tensor -> where it is read from
    :param device: where modules run
    :param scratch: folder for tensors that change; the same on all ranks
    """
    folder = scratch.resolve()
    _FromCheckpoint.sources.update(sources)
    if is_distributed():
        for number, tensor in enumerate(sources):
            DistributedCheckpointCache.files[tensor] = scratch_file(folder, f"changed_{number}")
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type != "meta":
                    tensors[name] = _kept_in_memory(tensor)
    cache = DistributedCheckpointCache if is_distributed() else CheckpointCache
    with caches_of(cache):
        for module in model.modules():
            offload_module(module, device, "disk", offload_dir=folder)


def _kept_in_memory(tensor: torch.Tensor) -> torch.Tensor:
    stand_in = to_tensor(torch.empty_like(tensor, device="meta"), tensor)
    _FromCheckpoint.resident[stand_in] = tensor
    return stand_in


def read_ahead(modules: Iterable[nn.Module]) -> None:
    """Have the system read what these modules need from their checkpoint, while something else is computed."""
    wanted: dict[StoredTensors, list[str]] = {}
    for module in modules:
        if isinstance(module._parameters, _FromCheckpoint):
            for tensor in module._parameters.offloaded_values.values():
                source = module._parameters.source(tensor) if tensor is not None else None
                for leaf in source.leaves() if source is not None else ():
                    wanted.setdefault(leaf.stored, []).extend(leaf.parts)
    for stored, names in wanted.items():
        stored.will_need(dict.fromkeys(names))


def source_of(module: nn.Module, name: str) -> Source | None:
    """Where a parameter or buffer of a module is read from; None when it has changed, or was never in a file."""
    for tensors in (module._parameters, module._buffers):
        if isinstance(tensors, _FromCheckpoint) and name in tensors:
            return tensors.source(tensors.offloaded_values[name])
    return None


def take(module: nn.Module, name: str, axis: int, kept: Sequence[int]) -> bool:
    """Keep some entries of an axis of a tensor that is read from a checkpoint, without reading it.

    :return: False where the tensor has no source and must be cut in memory
    """
    source = source_of(module, name)
    if source is None:
        return False
    tensors = module._parameters if name in module._parameters else module._buffers
    old = tensors.offloaded_values[name]
    taken = Taken(source, axis, kept)
    new = to_tensor(taken.meta.to(old.dtype), old)
    _FromCheckpoint.sources[new] = taken
    if old in DistributedCheckpointCache.files:
        file = DistributedCheckpointCache.files[old]
        DistributedCheckpointCache.files[new] = file.with_stem(f"{file.stem}_cut")
    tensors.offloaded_values[name] = new
    return True


def add(module: nn.Module, name: str, source: Source) -> torch.Tensor:
    """Give an opened module one more parameter that is read from the checkpoint.

    :return: the meta tensor that stands for it, to be forgotten with the model's others
    """
    tensor = nn.Parameter(torch.empty_like(source.meta), requires_grad=False)
    _FromCheckpoint.sources[tensor] = source
    module._parameters.offloaded_values[name] = tensor
    return tensor


def forget(tensors: list[torch.Tensor]) -> None:
    """Release what is known of a model's tensors once the model is gone."""
    for tensor in tensors:
        _FromCheckpoint.sources.pop(tensor, None)
        _FromCheckpoint.resident.pop(tensor, None)
        DistributedCheckpointCache.files.pop(tensor, None)
