"""Read single tensors of a checkpoint's files, without loading the files."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch

from llmcompressor_moe.checkpoint.layout import CheckpointLayout, TensorInfo, whole_layout

__all__ = ["TORCH_DTYPES", "CheckpointChangedError", "StoredTensors"]

# safetensors' names of the dtypes that torch computes with or can at least hold.
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class CheckpointChangedError(OSError):
    """A file of an opened checkpoint was replaced, changed or removed."""


class StoredTensors:
    """The tensors of a checkpoint directory, read when they are asked for.

    A read maps the file into memory, so only the pages that are used are read, and they do not count as memory
    of the process. The mapping is private: writing into a tensor changes neither the file nor later reads.

    :param layout: what the headers say
    """

    def __init__(self, layout: CheckpointLayout) -> None:
        self.path: Path = layout.path.resolve()
        self.tensors: dict[str, TensorInfo] = layout.tensors
        self._states = {file: _state(self.path / file) for file in layout.files}

    @classmethod
    def of(cls, path: str | Path) -> StoredTensors:
        """The tensors of a checkpoint directory.

        :raises ValueError: a file is missing or damaged, or the index does not match the files
        """
        return cls(whole_layout(path))

    def file(self, name: str) -> Path:
        """The file that holds a tensor, unchanged since the checkpoint was opened.

        :raises CheckpointChangedError: it is not
        """
        file = self.tensors[name].file
        path = self.path / file
        try:
            changed = _state(path) != self._states[file]
        except OSError as error:
            raise CheckpointChangedError(
                f"{str(path)!r} cannot be read any more ({error.strerror}). Put it back and start again."
            ) from error
        if changed:
            raise CheckpointChangedError(
                f"{str(path)!r} changed while it was in use. Leave the checkpoint alone and start again."
            )
        return path

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor on the CPU, in its stored dtype and shape, backed by the file.

        :raises CheckpointChangedError: its file changed since the checkpoint was opened
        :raises ValueError: torch has no such dtype
        """
        info = self.tensors[name]
        path = self.file(name)
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise ValueError(f"tensor {name!r} of {str(path)!r} is {info.dtype}, which torch cannot hold.")
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        raw = _mapped(path, info.start, info.nbytes)
        if info.start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)

    def meta(self, name: str) -> torch.Tensor:
        """A meta tensor of the stored dtype and shape."""
        info = self.tensors[name]
        return torch.empty(info.shape, dtype=TORCH_DTYPES.get(info.dtype, torch.uint8), device="meta")

    def will_need(self, names: Iterable[str]) -> None:
        """Have the system read tensors ahead, in the background."""
        if not hasattr(os, "posix_fadvise"):
            return
        by_file: dict[str, list[TensorInfo]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(self.tensors[name])
        for file, infos in by_file.items():
            descriptor = os.open(self.path / file, os.O_RDONLY)
            try:
                for info in infos:
                    os.posix_fadvise(descriptor, info.start, info.nbytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _mapped(path: Path, start: int, length: int) -> torch.Tensor:
    """Bytes of a file as a tensor whose pages are read when they are used.

    torch maps whole files only, which counts them whole against a limit on memory; Python's mmap keeps a file
    descriptor for every mapping, and a block of a large model has more tensors than a process may have of those.
    """
    skipped = start % mmap.PAGESIZE
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = _LIBC.mmap(
            None,
            skipped + length,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_PRIVATE,
            descriptor,
            start - skipped,
        )
    finally:
        os.close(descriptor)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(
            ctypes.get_errno(), f"{str(path)!r} cannot be mapped: {os.strerror(ctypes.get_errno())}"
        )
    pages = (ctypes.c_ubyte * (skipped + length)).from_address(address)
    weakref.finalize(pages, _LIBC.munmap, address, skipped + length)
    return torch.frombuffer(pages, dtype=torch.uint8)[skipped:]


def _state(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino
