"""From stored tensors to the plain weight that a model computes with, one weight at a time.

A codec is plain data: what the header and the config say about one stored weight. ``decode`` takes the
tensors by role, as ``encodings`` lists them, and reads nothing else. Arithmetic is in float32, rounded once to
the dtype that is asked for. Values are those of transformers 5 and compressed-tensors 0.19 when they
dequantize; where those round to bfloat16, so do these if bfloat16 is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.base import PACK_ZP_STRATS
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

__all__ = [
    "BlockFp4",
    "BlockFp8",
    "Codec",
    "Mxfp4",
    "Mxfp4Blocks",
    "NvFp4",
    "PackedInt",
    "PlainInt8",
    "ScaledFp8",
]


class Codec(Protocol):
    """How the parts of one logical tensor become that tensor."""

    @property
    def expert_axis(self) -> int | None:
        """Axis of every part that counts experts; None where the tensor belongs to one expert or to none.

        Where it is 0, ``decode`` also takes parts that were first indexed by one expert, and returns that
        expert's tensor.
        """
        ...

    def decode(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The plain tensor in ``dtype``, contiguous, on the device of its parts.

        :param parts: role -> stored tensor; roles that do not take part in decoding may be missing
        """
        ...


@dataclass(frozen=True)
class BlockFp8:
    """FP8 with one scale per block, as ``quant_method: fp8`` stores it.

    Weight [..., rows, columns], scale [..., blocks of rows, blocks of columns]; the last block of rows or
    columns may be smaller. Per-channel and per-tensor scales are blocks as wide as the weight. One float32
    copy of the weight is alive beside the result.

    :param block: rows and columns of a block
    :param stacked: projections that lie above each other in the weight, each with blocks of its own
    """

    block: tuple[int, int]
    stacked: int = 1
    expert_axis: int | None = None

    def decode(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `Codec.decode`; roles ``weight`` and ``scale``."""
        return _multiply_blocks(parts["weight"], parts["scale"], self.block, self.stacked, dtype)


@dataclass(frozen=True)
class BlockFp4:
    """Two E2M1 values per I8, with one scale per block: the experts of DeepSeek-V4 under ``quant_method: fp8``.

    Weight [..., rows, columns / 2], scale [..., blocks of rows, blocks of columns].

    :param block: rows and columns of a block, in values
    """

    block: tuple[int, int]
    stacked: int = 1
    expert_axis: int | None = None

    def decode(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `Codec.decode`; roles ``weight`` and ``scale``."""
        packed = parts["weight"].contiguous().view(torch.uint8)
        *before, half = packed.shape
        values = unpack_fp4_from_uint8(packed, math.prod(before), 2 * half, dtype=torch.float32)
        return _multiply_blocks(
            values.view(*before, 2 * half), parts["scale"], self.block, self.stacked, dtype
        )


@dataclass(frozen=True)
class Mxfp4Blocks:
    """MXFP4 experts as gpt-oss stores them, decoded by transformers to the layout that its model has.

    Blocks [experts, rows, groups, 16] and scales [experts, rows, groups] become [experts, 32 * groups, rows].
    """

    expert_axis: int | None = 0

    def decode(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `Codec.decode`; roles ``blocks`` and ``scales``."""
        blocks, scales = parts["blocks"], parts["scales"]
        if blocks.ndim == 3:
            return convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0]
        return convert_moe_packed_tensors(blocks, scales, dtype=dtype)


@dataclass(frozen=True)
class ScaledFp8:
    """compressed-tensors FP8: one scale per tensor, channel, block or group, also MXFP8's exponents."""

    weights: QuantizationArgs
    expert_axis: int | None = None

    def decode(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `Codec.decode`; roles are local names: ``weight``, ``weight_scale``."""
        return _dequantize(parts["weight"], parts, self.weights, dtype)


@dataclass(frozen=True)
class PlainInt8:
    """compressed-tensors integers of up to 8 bits, one per I8."""

    weights: QuantizationArgs
    expert_axis: int | None = None

    def decode(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `Codec.decode`; roles are local names: ``weight``, ``weight_scale``, ``weight_zero_point``."""
        return _dequantize(parts["weight"], parts, self.weights, dtype, parts.get("weight_zero_point"))


@dataclass(frozen=True)
class PackedInt:
    """compressed-tensors integers of 1 to 8 bits, packed densely into I32 along a row.

    :param shape: rows and columns, for checkpoints without ``weight_shape``
    """

    weights: QuantizationArgs
    shape: tuple[int, int]
    expert_axis: int | None = None

    def decode(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `Codec.decode`; roles are local names: ``weight_packed``, ``weight_scale``, ``weight_shape``,
        ``weight_zero_point``, ``weight_g_idx``.
        """
        bits, scale = self.weights.num_bits, parts["weight_scale"]
        shape = self.shape
        if "weight_shape" in parts:
            rows, columns = parts["weight_shape"].tolist()
            shape = (rows, columns)
        zero_point = parts.get("weight_zero_point")
        if not self.weights.symmetric and self.weights.strategy in PACK_ZP_STRATS:
            zero_point = unpack_from_int32(zero_point, bits, (shape[0], scale.shape[-1]), packed_dim=0)
        values = unpack_from_int32(parts["weight_packed"], bits, shape)
        groups = parts.get("weight_g_idx")
        if groups is None or bool((groups < 0).any()):
            return _dequantize(values, parts, self.weights, dtype, zero_point)
        # compressed-tensors 0.19 reads groups of neighbors only, earlier releases wrote others with GPTQ's
        # activation ordering: bring the columns of a group together, and back afterwards.
        order = torch.argsort(groups, stable=True)
        plain = _dequantize(values[:, order], parts, self.weights, dtype, zero_point)
        return plain[:, torch.argsort(order)]


@dataclass(frozen=True)
class NvFp4:
    """compressed-tensors NVFP4: two E2M1 values per U8, an FP8 scale per group, and one scale for all."""

    weights: QuantizationArgs
    expert_axis: int | None = None

    def decode(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `Codec.decode`; roles are local names: ``weight_packed``, ``weight_scale``,
        ``weight_global_scale``.
        """
        return _dequantize(_unpack_fp4(parts["weight_packed"]), parts, self.weights, dtype)


@dataclass(frozen=True)
class Mxfp4:
    """compressed-tensors MXFP4: two E2M1 values per U8, and an exponent per group."""

    weights: QuantizationArgs
    expert_axis: int | None = None

    def decode(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `Codec.decode`; roles are local names: ``weight_packed``, ``weight_scale``."""
        return _dequantize(_unpack_fp4(parts["weight_packed"]), parts, self.weights, dtype)


def _unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    rows, half = packed.shape
    return unpack_fp4_from_uint8(packed, rows, 2 * half, dtype=torch.float32)


def _dequantize(
    values: torch.Tensor,
    parts: dict[str, torch.Tensor],
    weights: QuantizationArgs,
    dtype: torch.dtype,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """compressed-tensors' dequantization of a [rows, columns] weight, in float32 and then rounded."""
    scale = parts["weight_scale"]
    if scale.dtype is torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    scale = (decompress_mx_scale(scale) if scale.dtype is torch.uint8 else scale).to(torch.float32)
    if scale.ndim == 1 and len(scale) > 1:
        # one per row: as it is, it would be broadcast along the columns
        scale = scale[:, None]
    global_scale = parts.get("weight_global_scale")
    plain = dequantize(
        values,
        scale,
        zero_point,
        args=weights,
        global_scale=None if global_scale is None else global_scale.to(torch.float32),
    )
    return plain.to(dtype).contiguous()


def _multiply_blocks(
    values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], stacked: int, dtype: torch.dtype
) -> torch.Tensor:
    *before, rows, columns = values.shape
    height, width = block
    own_rows = rows // stacked
    down, across = math.ceil(own_rows / height), math.ceil(columns / width)
    # Room for whole blocks, so that scales can be broadcast; what lies beyond the edge is never looked at.
    room = (*before, stacked, down * height, across * width)
    plain = torch.empty(room, dtype=torch.float32, device=values.device)
    inside = plain[..., :own_rows, :columns]
    inside.copy_(values.reshape(*before, stacked, own_rows, columns))
    if scale.dtype is torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    scales = scale.to(torch.float32).reshape(*before, stacked, down, 1, across, 1)
    plain.view(*before, stacked, down, height, across, width).mul_(scales)
    return inside.to(dtype).reshape(*before, rows, columns).contiguous()
