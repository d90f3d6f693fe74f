"""Bytes on disk: exact sizes of tensors, plain and compressed, with their entries in the files' headers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from llmcompressor_moe.checkpoint.compressed import compressed_tensors_of

__all__ = ["StoredSize", "linear_size", "tensor_size"]

_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class StoredSize:
    """What something takes in a checkpoint.

    :param nbytes: bytes of its tensors
    :param header: bytes that its entries take in the headers, without the tensors' offsets
    :param tensors: number of tensors
    :param bits: bits of weights, scales and zero points alone
    :param weights: number of weights behind ``bits``
    """

    nbytes: int = 0
    header: int = 0
    tensors: int = 0
    bits: int = 0
    weights: int = 0

    def on_disk(self, digits: int) -> int:
        """Bytes in the files, at most.

        :param digits: digits of the largest offset in a file; every tensor's entry has two offsets
        """
        return self.nbytes + self.header + 2 * digits * self.tensors

    def __add__(self, other: StoredSize) -> StoredSize:
        return StoredSize(
            self.nbytes + other.nbytes,
            self.header + other.header,
            self.tensors + other.tensors,
            self.bits + other.bits,
            self.weights + other.weights,
        )


def tensor_size(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredSize:
    """One tensor in a safetensors file."""
    entry = {"dtype": _DTYPES.get(dtype, "U8"), "shape": list(shape), "data_offsets": []}
    # Two braces less, two commas more.
    header = len(json.dumps({name: entry}, separators=(",", ":")))
    return StoredSize(math.prod(shape) * dtype.itemsize, header, tensors=1)


def linear_size(name: str, linear: nn.Linear, scheme: QuantizationScheme | None) -> StoredSize:
    """A Linear as it is saved under a scheme (None: plain).

    :param linear: only its sizes and dtype are looked at
    """
    dtype, weights = linear.weight.dtype, linear.in_features * linear.out_features
    if scheme is None:
        tensors = {"weight": ((linear.out_features, linear.in_features), dtype)}
        if linear.bias is not None:
            tensors["bias"] = ((linear.out_features,), dtype)
    else:
        tensors = _compressed(
            linear.in_features, linear.out_features, linear.bias is not None, scheme.model_dump_json(), dtype
        )
    size = StoredSize(weights=weights)
    for leaf, (shape, kind) in tensors.items():
        size += tensor_size(f"{name}.{leaf}", shape, kind)
        if leaf.startswith("weight") and leaf not in ("weight_shape", "weight_g_idx"):
            size += StoredSize(bits=8 * math.prod(shape) * kind.itemsize)
    return size


@lru_cache(maxsize=4096)
def _compressed(
    in_features: int, out_features: int, bias: bool, scheme: str, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    parsed = QuantizationScheme.model_validate_json(scheme)
    return compressed_tensors_of(
        in_features, out_features, bias, parsed, infer_module_format(nn.Linear, parsed), dtype
    )
