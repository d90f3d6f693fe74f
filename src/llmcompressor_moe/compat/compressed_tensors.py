"""compressed-tensors: how it keeps weights of offloaded modules, scales tokens without a batch, decompresses."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.offload.cache import DiskCache
from compressed_tensors.offload.cache.base import OffloadCache
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.lifecycle import forward
from compressed_tensors.utils import patch_attr

__all__ = ["HOLDS_FOR", "caches_of", "decompress_in", "is_offloaded", "scale_each_token", "scratch_file"]

HOLDS_FOR = "compressed-tensors>=0.19,<0.20"

# Their weights come out in bfloat16, whatever the model is in. MXFP4 inherits from NVFP4.
_IN_BFLOAT16: tuple[type[BaseCompressor], ...] = (NVFP4PackedCompressor, MXFP8QuantizationCompressor)


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether any module's weights live somewhere else than where they are used.

    compressed-tensors puts a cache in the place of a module's dictionary of parameters and has no function that
    says so for a whole model. Its caches also stand on modules that are not moved, so devices are compared.
    """
    caches = (module._parameters for module in model.modules())
    return any(
        isinstance(cache, OffloadCache) and cache.offload_device != cache.onload_device for cache in caches
    )


@contextlib.contextmanager
def caches_of(cache: type[OffloadCache]) -> Iterator[None]:
    """Context in which `offload_module` gives modules caches of a class of ours.

    compressed-tensors chooses the class by device and has no way to add one.
    """
    with patch_attr(OffloadCache, "cls_from_device", lambda *_: cache):
        yield


def scratch_file(folder: Path, name: str) -> Path:
    """A file in a folder that a disk cache may overwrite and delete.

    compressed-tensors touches files of its own prefix only, and names them by the address of a tensor, which other
    ranks cannot know.
    """
    return folder / f"{DiskCache._ct_file_prefix}_{name}.safetensors"


def scale_each_token() -> None:
    """Give every token a scale of its own where a scheme says so, also without a batch dimension.

    compressed-tensors takes the first two dimensions of a value for batch and token. Experts get tokens without a
    batch; for [tokens, features] it computes one scale for all of them, which engines do not.
    """
    if not hasattr(forward.compute_dynamic_scales_and_zp, "__wrapped__"):
        forward.compute_dynamic_scales_and_zp = _each_token(forward.compute_dynamic_scales_and_zp)


def _each_token(compute: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., Any]:
    @functools.wraps(compute)
    def scales(
        value: torch.Tensor, args: QuantizationArgs, *rest: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if value.ndim != 2 or args.strategy != QuantizationStrategy.TOKEN:
            return compute(value, args, *rest, **more)
        scale, zero_point = compute(value[None], args, *rest, **more)
        return scale[0], zero_point[0]

    return scales


Decode = Callable[[dict[str, torch.Tensor], QuantizationScheme, torch.dtype], torch.Tensor]


def decompress_in(compressor: ModelCompressor, dtype: torch.dtype, decode: Decode) -> None:
    """Let a model's compressor give FP4 and MX weights the dtype that the rest of the model has.

    compressed-tensors has no argument for it, and a model in another dtype than bfloat16 ends at its first Linear.

    :param decode: from the tensors of a compressed Linear, by local name, to its weight
    """
    if dtype == torch.bfloat16:
        return
    decompress_model = compressor.decompress_model

    def in_dtype(original: classmethod) -> classmethod:
        def decompress(
            cls: type[BaseCompressor], stored: dict[str, torch.Tensor], scheme: QuantizationScheme
        ) -> dict[str, torch.Tensor]:
            # Scales stay upstream's: it compresses by them when the model is saved again.
            plain = original.__func__(cls, stored, scheme)
            return plain | {"weight": decode(stored, scheme, dtype)}

        return classmethod(decompress)

    @functools.wraps(decompress_model)
    def decompress(model: torch.nn.Module) -> None:
        originals = {cls: vars(cls)["decompress"] for cls in _IN_BFLOAT16}
        for cls, original in originals.items():
            cls.decompress = in_dtype(original)
        try:
            decompress_model(model)
        finally:
            for cls, original in originals.items():
                cls.decompress = original

    compressor.decompress_model = decompress
