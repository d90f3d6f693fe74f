"""Lets vLLM serve compressed experts where it has no kernel for them: a CPU without AMX. For tests only.

vLLM still chooses the scheme of each layer, names and allocates the parameters and loads them with its own
weight loaders; only then are they decompressed (by compressed-tensors, where that is their format), and vLLM's
unquantized MoE computes with the result. What vLLM does after loading is left out: its kernels, and the
rounding of activations.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

_QUANTIZATION = "vllm.model_executor.layers.quantization"
_METHODS = f"{_QUANTIZATION}.compressed_tensors.compressed_tensors_moe"

# Module under _METHODS: vLLM's method, the function in it that looks for a kernel, the storage format.
_COVERED = {
    "wna16": ("CompressedTensorsWNA16MoEMethod", "select_wna16_moe_backend", "pack-quantized"),
    "w8a8_int8": ("CompressedTensorsW8A8Int8MoEMethod", "select_int8_moe_backend", "int-quantized"),
    "w8a8_fp8": ("CompressedTensorsW8A8Fp8MoEMethod", "select_fp8_moe_backend", "float-quantized"),
    "w4a4_nvfp4": ("CompressedTensorsW4A4Nvfp4MoEMethod", "select_nvfp4_moe_backend", "nvfp4-pack-quantized"),
    "w4a4_mxfp4": ("CompressedTensorsW4A4Mxfp4MoEMethod", None, "mxfp4-pack-quantized"),
}
# The values of four bits without their sign.
_FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# Schemes of methods that do not keep what the config said.
_PRESETS = {"nvfp4-pack-quantized": "NVFP4A16", "mxfp4-pack-quantized": "MXFP4A16"}


def serve_compressed_experts_decompressed() -> None:
    """Replace vLLM's methods for compressed experts in this process."""
    from compressed_tensors.compressors.nvfp4 import base

    # Kernels multiply FP4 values by their scales in float32; compressed-tensors does so in bfloat16.
    base.unpack_fp4_from_uint8 = functools.partial(base.unpack_fp4_from_uint8, dtype=torch.float32)
    for module_name, (method, kernel_choice, storage) in _COVERED.items():
        module = importlib.import_module(f"{_METHODS}.compressed_tensors_moe_{module_name}")
        # Of the kernels for packed integers only Marlin takes scales per channel; the method asks which it got.
        kernel = module.WNA16MoEBackend.MARLIN if module_name == "wna16" else None
        module.check_moe_marlin_supports_config = lambda *_, **__: True
        if kernel_choice is not None:
            setattr(module, kernel_choice, lambda *_, kernel=kernel, **__: (kernel, None))
        setattr(module, method, _decompressing(getattr(module, method), _by_compressed_tensors(storage)))
    _serve_packed_linears_unpacked()
    _serve_fp8_blocks_decompressed()
    mxfp4 = importlib.import_module(f"{_QUANTIZATION}.mxfp4")
    mxfp4.select_mxfp4_moe_backend = lambda *_, **__: (None, None)
    mxfp4.GptOssMxfp4MoEMethod = _decompressing(mxfp4.GptOssMxfp4MoEMethod, _from_mxfp4)
    mxfp4.GptOssMxfp4Config.get_supported_act_dtypes = _float32_alone


def _float32_alone(*_: Any) -> list[torch.dtype]:
    """What tests compute in; kernels would take less."""
    return [torch.float32]


# Decodes what was loaded of a projection, given the method and the number of weights stacked in each expert's.
_Decode = Callable[[Any, dict[str, torch.Tensor], int], torch.Tensor]


def _decompressing(method: type, decode: _Decode) -> type:
    """A subclass of a vLLM method that hands over to the unquantized one once weights are loaded."""
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

    def create_weights(self: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        method.create_weights(self, layer, *args, **kwargs)
        # vLLM starts scales at one, where one that was never loaded could hide.
        for parameter in layer.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data.fill_(torch.nan)

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        for name, shards in (("w13", 2), ("w2", 1)):
            weight = decode(self, _take(layer, name), shards)
            layer.register_parameter(f"{name}_weight", torch.nn.Parameter(weight, requires_grad=False))
            if hasattr(layer, f"{name}_bias"):
                # Some methods load biases in bfloat16, whatever the model computes in.
                bias = getattr(layer, f"{name}_bias")
                bias.data = bias.data.to(weight.dtype)
        plain = UnquantizedFusedMoEMethod(self.moe)
        layer._replace_quant_method(plain)
        plain.process_weights_after_loading(layer)

    # vLLM's weight loader goes by the name of the class.
    body = {
        "create_weights": create_weights,
        "process_weights_after_loading": process_weights_after_loading,
    }
    return type(method.__name__, (method,), body)


def _serve_fp8_blocks_decompressed() -> None:
    """The same for blocks of FP8 as DeepSeek stores them, in experts and Linears."""
    module = importlib.import_module(f"{_QUANTIZATION}.fp8")
    module.select_fp8_moe_backend = lambda *_, **__: (None, None)
    module.init_fp8_linear_kernel = lambda *_, **__: None
    module.Fp8MoEMethod = _decompressing(module.Fp8MoEMethod, _from_fp8_blocks)

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        stored = {"weight": layer.weight.data, "weight_scale_inv": layer.weight_scale_inv.data}
        layer.unpacked = _from_fp8_blocks(self, stored)

    def apply(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.unpacked, bias)

    module.Fp8Config.get_supported_act_dtypes = _float32_alone
    module.Fp8LinearMethod.process_weights_after_loading = process_weights_after_loading
    module.Fp8LinearMethod.apply = apply


def _from_fp8_blocks(method: Any, stored: dict[str, torch.Tensor], shards: int = 1) -> torch.Tensor:
    """Weights [..., out, in] of blocks that have one scale each, [..., out / rows, in / columns]."""
    rows, columns = method.weight_block_size
    scales = stored["weight_scale_inv"].repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return stored["weight"].float() * scales


def _from_mxfp4(method: Any, stored: dict[str, torch.Tensor], shards: int) -> torch.Tensor:
    """Weights [experts, out, in] of 4-bit floats, the lower half of a byte first, one exponent per 32."""
    bits = torch.stack([stored["weight"] & 15, stored["weight"] >> 4], -1).flatten(-2).long()
    values = torch.tensor([*_FP4, *(-value for value in _FP4)])[bits]
    scales = torch.exp2(stored["weight_scale"].float() - 127)
    return (values.unflatten(-1, (-1, 32)) * scales[..., None]).flatten(-2)


def _by_compressed_tensors(storage: str) -> _Decode:
    return lambda method, stored, shards: _decompress(stored, shards, _scheme(method, storage), storage)


def _serve_packed_linears_unpacked() -> None:
    """The same for Linears of packed integers: a CPU has no kernel for 8 bit, nor for 4 bit in float32."""
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16

    class Unpacked(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

            packed, scale, _ = self._get_weight_params(layer)
            shape = torch.Size(reversed(self.config.partition_weight_shape))
            integers = unpack_from_int32(packed.data, self.config.weight_type.size_bits, shape)
            groups = integers.unflatten(-1, (scale.shape[-1], -1)).to(scale.dtype)
            layer.unpacked = (groups * scale.data[..., None]).flatten(-2)

        def apply_weights(
            self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            return torch.nn.functional.linear(x, layer.unpacked, bias)

    compressed_tensors_wNa16.choose_mp_linear_kernel = lambda _config: Unpacked


def _take(layer: Any, name: str) -> dict[str, torch.Tensor]:
    """Remove a projection's parameters from the layer: name without the prefix -> [experts, ...]."""
    taken = {}
    for full_name, parameter in list(layer.named_parameters(recurse=False)):
        if full_name.startswith(f"{name}_") and not full_name.endswith("_bias"):
            taken[full_name.removeprefix(f"{name}_")] = parameter.data
            delattr(layer, full_name)
    return taken


def _scheme(method: Any, storage: str) -> Any:
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    if storage in _PRESETS:
        return preset_name_to_scheme(_PRESETS[storage], [])
    return QuantizationScheme(targets=[], weights=method.weight_quant, input_activations=method.input_quant)


def _decompress(stored: dict[str, torch.Tensor], shards: int, scheme: Any, storage: str) -> torch.Tensor:
    """The weights [experts, out, in] of a projection made of `shards` that were compressed one by one."""
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(storage)
    scales = stored.get("weight_global_scale")
    # vLLM's kernels take the first shard's for both.
    assert scales is None or shards == 1 or torch.equal(scales[:, 0], scales[:, 1]), scales
    kinds = {kind: tensor for kind, tensor in stored.items() if not kind.startswith("input")}
    experts = []
    for expert in range(len(next(iter(kinds.values())))):
        parts = []
        for shard in range(shards):
            state = {
                kind: tensor[expert].reshape(shards, -1, *tensor.shape[2:])[shard]
                for kind, tensor in kinds.items()
                if kind != "weight_shape"
            }
            if "weight_shape" in kinds:
                rows, words = state["weight_packed"].shape
                state["weight_shape"] = torch.tensor([rows, words * 32 // scheme.weights.num_bits])
            parts.append(compressor.decompress(state, scheme)["weight"])
        experts.append(torch.cat(parts))
    return torch.stack(experts).float()
