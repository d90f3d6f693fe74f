"""Write safetensors files piece by piece, so that neither a file nor a tensor has to fit in memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llmcompressor_moe.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from llmcompressor_moe.checkpoint.stored import TORCH_DTYPES

__all__ = ["FileRange", "OutputTensor", "dtype_name", "pack", "write_file", "write_shards"]

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_CHUNK = 64 * 1024 * 1024


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file that are copied as they are."""

    path: Path
    start: int
    length: int


Piece = FileRange | torch.Tensor


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    :param dtype: safetensors' name of its dtype
    :param pieces: makes its bytes, in order: ranges of files, or tensors
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[Piece]]


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' name of a dtype."""
    return _NAMES[dtype]


def pack(tensors: Sequence[OutputTensor], max_bytes: int) -> list[list[OutputTensor]]:
    """Shards of at most ``max_bytes``, in order; a larger tensor gets one for itself."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_shards(
    directory: Path,
    tensors: Sequence[OutputTensor],
    max_bytes: int,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write tensors into ``directory`` as shards with an index, or as one file without.

    A shard gets its name when it is complete; one that is there already is kept.

    :param on_bytes: called with the bytes written since the last call
    :raises OSError: it cannot be written
    """
    shards = pack(tensors, max_bytes)
    names = (
        [SINGLE_NAME]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        path = directory / name
        if path.exists():
            on_bytes(sum(tensor.nbytes for tensor in shard))
            continue
        write_file(path, shard, on_bytes=on_bytes)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {
                tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
            },
        }
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(
    path: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one safetensors file, which gets its name when all of it is on the disk.

    :param metadata: beside the format
    :param on_bytes: see `write_shards`
    :raises OSError: it cannot be written
    """
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        _write(file, tensors, metadata or {}, on_bytes)
        file.flush()
        # Without this, a file that has its name may be empty after a power failure.
        os.fsync(file.fileno())
    unfinished.replace(path)


def _write(
    file: BinaryIO,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
) -> None:
    file.write(_header(tensors, metadata))
    for tensor in tensors:
        written = 0
        for piece in tensor.pieces():
            for count in _copied(file, piece) if isinstance(piece, FileRange) else _stored(file, piece):
                written += count
                on_bytes(count)
        if written != tensor.nbytes:
            raise OSError(
                f"{tensor.name}: {written} bytes were written, its shape and dtype demand {tensor.nbytes}"
            )


def _header(tensors: Iterable[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _copied(file: BinaryIO, piece: FileRange) -> Iterator[int]:
    file.flush()
    with piece.path.open("rb") as source:
        position, left = piece.start, piece.length
        while left:
            count = 0
            with contextlib.suppress(OSError, AttributeError):
                # The system copies within the page cache, or not at all where the file system shares blocks.
                count = os.copy_file_range(source.fileno(), file.fileno(), min(left, _CHUNK), position)
            if not count:
                source.seek(position)
                data = source.read(min(left, _CHUNK))
                if not data:
                    raise OSError(f"{str(piece.path)!r} ends before byte {piece.start + piece.length}")
                file.write(data)
                file.flush()
                count = len(data)
            position += count
            left -= count
            yield count
    file.seek(0, os.SEEK_END)


def _stored(file: BinaryIO, tensor: torch.Tensor) -> Iterator[int]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    file.write(memoryview(flat.numpy()))
    yield flat.numel()
