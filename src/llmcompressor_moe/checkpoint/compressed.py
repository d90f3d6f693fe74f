"""What a Linear is stored as under a compressed-tensors scheme: names, shapes and dtypes, without any data."""

from __future__ import annotations

import math

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

__all__ = ["compressed_tensors_of"]


def compressed_tensors_of(
    in_features: int,
    out_features: int,
    bias: bool,
    scheme: QuantizationScheme,
    form: CompressionFormat,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Local tensor name -> (shape, dtype) of a compressed Linear.

    :param dtype: dtype of the plain weight
    :raises Exception: whatever compressed-tensors says of a scheme that cannot be applied to these sizes
    """
    scheme = scheme.model_copy(deep=True)
    with torch.device("meta"):
        linear = torch.nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
        initialize_module_for_quantization(linear, scheme)
        if form is not CompressionFormat.dense:
            BaseCompressor.get_value_from_registry(form.value).compress_module(linear)
    found = {name: (tuple(value.shape), value.dtype) for name, value in linear.state_dict().items()}
    weights = scheme.weights
    packs_zero_point = (
        form is CompressionFormat.pack_quantized
        and weights.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
        and "weight_zero_point" in found
    )
    if packs_zero_point:
        # compressed-tensors packs zero points along the rows, but not on the meta device
        (rows, columns), _ = found["weight_zero_point"]
        found["weight_zero_point"] = ((math.ceil(rows * weights.num_bits / 32), columns), torch.int32)
    return found
