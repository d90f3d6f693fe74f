"""AWQ's search for scales, where the layers that read one norm have several schemes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from compressed_tensors.quantization import QuantizationArgs, forward_quantize
from compressed_tensors.utils import patch_attr
from llmcompressor.modifiers.transform.awq import base
from torch import nn

__all__ = ["each_in_its_own_scheme"]


@contextlib.contextmanager
def each_in_its_own_scheme() -> Iterator[None]:
    """Context in which the search rounds every layer by the layer's own scheme.

    llm-compressor rounds all of them by that of the last one, with their own scales. Routed and shared experts
    read the same norm; where these have another scheme than those, the shapes do not fit, or the error is that of
    other bits.
    """
    with patch_attr(base, "forward_quantize", _by_its_own_scheme):
        yield


def _by_its_own_scheme(
    module: nn.Module, value: torch.Tensor, base_name: str, _args: QuantizationArgs
) -> torch.Tensor:
    return forward_quantize(module, value, base_name, module.quantization_scheme.weights)
