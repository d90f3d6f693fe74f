"""Tell models apart whose configs are alike, without reading all of their weights."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

from llmcompressor_moe.checkpoint.layout import TensorInfo, whole_layout

__all__ = ["fingerprint"]

# Training changes nearly every value of a tensor that it changes at all, so a few places of each suffice.
_PLACES = 3
_BYTES = 64


def fingerprint(model: str | Path) -> str:
    """sha256 of a model's config and, of every tensor, of name, dtype, shape and some bytes.

    How tensors are spread over files makes no difference.

    :param model: its directory
    :raises ValueError: a weight file is missing or damaged
    """
    layout = whole_layout(model)
    by_file: dict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in layout.tensors.values():
        by_file[tensor.file].append(tensor)
    samples: dict[str, bytes] = {}
    for name, tensors in by_file.items():
        with (layout.path / name).open("rb") as file:
            for tensor in tensors:
                taken = b""
                for place in range(_PLACES):
                    file.seek(tensor.start + place * max(tensor.nbytes - _BYTES, 0) // (_PLACES - 1))
                    taken += file.read(min(_BYTES, tensor.nbytes))
                samples[tensor.name] = taken
    digest = hashlib.sha256((layout.path / "config.json").read_bytes())
    for name, tensor in sorted(layout.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(samples[name])
    return digest.hexdigest()
