"""Lets vLLM serve an FP8 KV cache where it has no kernel for one: a CPU without AVX-512. For tests only.

vLLM still reads the scheme, makes the parameters for scales and loads them. Keys and values are rounded by those
scales before they are cached, and cached in the dtype that the model computes in.
"""

from functools import wraps
from typing import Any

import torch

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max


def serve_fp8_caches_rounded() -> None:
    """Replace vLLM's caching in this process; caches that are not quantized stay as they are."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backends import cpu_attn

    _after(Attention, "__init__", _cached_as_computed)
    _after(cpu_attn.CPUAttentionMetadataBuilder, "__init__", _unquantized)
    choose = cpu_attn._get_attn_isa
    cpu_attn._get_attn_isa = lambda dtype, block_size, head_size=None, _cache=None: choose(
        dtype, block_size, head_size
    )
    implementation = cpu_attn.CPUAttentionBackendImpl
    cache = implementation.do_kv_cache_update

    def cache_rounded(
        self: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any
    ) -> None:
        if layer.kv_cache_dtype.startswith("fp8"):
            key = _rounded(key, layer._k_scale_float)
            value = _rounded(value, layer._v_scale_float)
        cache(self, layer, key, value, *rest, **named)

    implementation.do_kv_cache_update = cache_rounded


def _after(owner: type, name: str, then: Any) -> None:
    method = getattr(owner, name)

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        then(self)

    setattr(owner, name, call)


def _cached_as_computed(attention: Any) -> None:
    # Its own name for the dtype stays: by that vLLM decides whether to take the scales of the checkpoint.
    if attention.kv_cache_dtype.startswith("fp8"):
        attention.kv_cache_torch_dtype = torch.get_default_dtype()
        attention.impl.kv_cache_dtype, attention.impl.is_fp8_kv_cache = "auto", False


def _unquantized(builder: Any) -> None:
    builder.kv_cache_dtype = "auto"


def _rounded(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    return (tensor / scale).clamp(-_LARGEST, _LARGEST).to(_FP8).to(tensor.dtype) * scale
