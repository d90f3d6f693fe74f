"""Hidden states that wait between blocks: in memory up to a limit, in memory-mapped files beyond it."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Waiting", "tensors_in"]


class Waiting:
    """Keeps the tensors of batches that wait small.

    A tensor stays the same object, only its storage changes: whoever else holds it (the model's own loop over its
    blocks does) does not keep the old storage alive.
    """

    def __init__(
        self, device: torch.device, device_limit: int, host_limit: int, scratch: Path | None
    ) -> None:
        """
        :param device: where batches are computed
        :param device_limit: bytes that may wait there
        :param host_limit: bytes that may wait in the host's memory; only for accelerators
        :param scratch: directory for files, see `RunOptions.scratch`
        """
        self._device, self._limit, self._scratch = device, device_limit, scratch
        self._host_limit = host_limit if device.type != "cpu" else 0
        self._on_device: dict[int, int] = {}
        self._on_host: dict[int, int] = {}
        self._device_total = self._host_total = 0
        self._moved: dict[int, dict[int, torch.Tensor]] = {}
        self._names = itertools.count()
        self._stack = contextlib.ExitStack()
        self._directory: Path | None = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def put(self, batch: int, tensors: Iterable[torch.Tensor]) -> None:
        """A batch waits.

        :param tensors: what it holds that may be moved
        :raises OSError: the scratch directory is full
        """
        moved = self._moved.pop(batch, {})
        every = {id(tensor): tensor for tensor in tensors}
        # A mask goes from block to block, and stays where it was put the first time.
        kept = {key: tensor for key, tensor in every.items() if key in moved}
        here = [tensor for key, tensor in every.items() if key not in kept]
        size = sum(tensor.nbytes for tensor in here)
        self._device_total -= self._on_device.pop(batch, 0)
        if self._device_total + size <= self._limit:
            self._on_device[batch] = size
            self._device_total += size
        else:
            self._move(batch, here, size)
            kept |= {id(tensor): tensor for tensor in here}
        self._moved[batch] = kept

    def take(self, batch: int) -> None:
        """A batch goes on: everything it holds is on the device again."""
        if self._device.type == "cpu":
            # Mapped files are as good as memory.
            return
        self._host_total -= self._on_host.pop(batch, 0)
        for tensor in self._moved.pop(batch, {}).values():
            tensor.data = tensor.data.to(self._device, non_blocking=True)

    def _move(self, batch: int, tensors: list[torch.Tensor], size: int) -> None:
        if self._host_total + size <= self._host_limit:
            self._on_host[batch] = size
            self._host_total += size
            for tensor in tensors:
                tensor.data = tensor.data.cpu()
            return
        for tensor in tensors:
            tensor.data = self._mapped(tensor.data)

    def _mapped(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            return tensor
        if self._directory is None:
            directory = tempfile.TemporaryDirectory(prefix="calibration-", dir=self._scratch)
            self._directory = Path(self._stack.enter_context(directory))
        path = self._directory / str(next(self._names))
        _reserve(path, tensor.nbytes)
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        # The mapping keeps the file's contents for as long as the tensor lives.
        path.unlink()
        return mapped.view(tensor.shape).copy_(tensor)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested tuples, lists and dicts, parameters left out."""
    if isinstance(values, torch.Tensor):
        if not isinstance(values, nn.Parameter):
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def _reserve(path: Path, size: int) -> None:
    """Take the space now: a write into a mapped file that finds the disk full kills the process."""
    with path.open("wb") as file:
        if not hasattr(os, "posix_fallocate"):
            file.truncate(size)
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"hidden states do not fit in scratch={str(path.parent.parent)!r} ({error.strerror}): choose a "
                "directory with more space, raise max_memory, or calibrate on fewer tokens",
            ) from error
