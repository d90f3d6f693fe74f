"""Lets vLLM serve packed int4 experts where it has no kernel for them: a CPU without AMX. For tests only.

vLLM still chooses the scheme of each layer, names and allocates the packed parameters and loads them with its
own weight loaders; only then are they unpacked, and its unquantized MoE computes with them.
"""

from fractions import Fraction
from typing import Any

import torch


def serve_packed_experts_unpacked() -> None:
    """Replace vLLM's method for packed integer experts in this process."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        CompressedTensorsMoEMethod,
        compressed_tensors_moe_wna16,
    )

    class UnpackedExperts(compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod):
        def __init__(
            self, weight_quant: Any, input_quant: Any, moe: Any, layer_name: str | None = None
        ) -> None:
            # Past the parent's constructor, which asks for a kernel and finds none.
            CompressedTensorsMoEMethod.__init__(self, moe)
            assert weight_quant.symmetric, "the shim unpacks symmetric weights only"
            self.weight_quant, self.input_quant, self.symmetric = weight_quant, input_quant, True
            self.num_bits, self.strategy = weight_quant.num_bits, weight_quant.strategy
            self.packed_factor = Fraction(32, weight_quant.num_bits)
            self.group_size = -1 if weight_quant.group_size is None else weight_quant.group_size
            self.is_marlin = self.is_transposed = False
            self.input_dtype = torch.float32

        def process_weights_after_loading(self, layer: Any) -> None:
            for name in ("w13", "w2"):
                packed, scale = (
                    getattr(layer, f"{name}_weight_packed"),
                    getattr(layer, f"{name}_weight_scale"),
                )
                experts, rows, words = packed.shape
                columns = int(words * self.packed_factor)
                flat = unpack_from_int32(
                    packed.reshape(experts * rows, words),
                    self.num_bits,
                    torch.Size([experts * rows, columns]),
                )
                groups = flat.view(experts, rows, scale.shape[-1], -1).to(scale.dtype)
                weight = (groups * scale[..., None]).view(experts, rows, columns)
                for suffix in ("weight_packed", "weight_scale", "weight_shape"):
                    delattr(layer, f"{name}_{suffix}")
                layer.register_parameter(f"{name}_weight", torch.nn.Parameter(weight, requires_grad=False))
            plain = UnquantizedFusedMoEMethod(self.moe)
            layer._replace_quant_method(plain)
            plain.process_weights_after_loading(layer)

    compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod = UnpackedExperts
