"""Weights of released checkpoints decode to what transformers and compressed-tensors make of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from support import saved
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmcompressor_moe.checkpoint.encodings import (
    Encoded,
    UnreadablePrecisionError,
    logical_tensors,
    refuse_unreadable,
)
from llmcompressor_moe.checkpoint.layout import CheckpointLayout, read_layout

EXPERT = "model.layers.0.mlp.experts.3.up_proj"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stored(directory: Path, tensors: Tensors) -> CheckpointLayout:
    """The layout of a checkpoint with these tensors."""
    save_file(tensors, directory / "model.safetensors")
    return read_layout(directory)


def parts_of(encoded: Encoded, tensors: Tensors) -> Tensors:
    return {role: tensors[name] for role, name in encoded.parts.items()}


def decode(encoded: Encoded, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    plain = encoded.codec.decode(parts_of(encoded, tensors), dtype)
    assert plain.dtype is dtype
    assert plain.is_contiguous()
    assert tuple(plain.shape) == encoded.shape
    return plain


def one(directory: Path, tensors: Tensors, config: dict[str, Any]) -> Encoded:
    """The only encoded tensor of a checkpoint."""
    found, claimed = logical_tensors(stored(directory, tensors), config)
    (encoded,) = found.values()
    assert claimed == set(encoded.parts.values())
    return encoded


def fp8_quantized(name: str, weight: torch.Tensor, config: dict[str, Any]) -> Tensors:
    quantizer = type("Quantizer", (), {"quantization_config": FineGrainedFP8Config(**config)})()
    return {
        key: value.contiguous() for key, value in Fp8Quantize(quantizer)._quantize_one(name, weight).items()
    }


def blockwise(rows: int, columns: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    return weight, torch.rand(-(-rows // block), -(-columns // block)) + 0.01


def test_plain_checkpoints_have_nothing_to_decode(tmp_path):
    layout = stored(tmp_path, {"a.weight": torch.zeros(2, 2, dtype=torch.bfloat16)})
    assert logical_tensors(layout, None) == ({}, set())
    assert logical_tensors(layout, FP8) == ({}, set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_blocks_as_transformers_reads_them(tmp_path, scale_fmt, dtype):
    tensors = fp8_quantized(f"{EXPERT}.weight", torch.randn(64, 96), FP8 | {"scale_fmt": scale_fmt})
    weight, scale = tensors[f"{EXPERT}.weight"], tensors[f"{EXPERT}.weight_scale_inv"]
    encoded = one(tmp_path, tensors, FP8)
    assert encoded.name == f"{EXPERT}.weight"
    assert encoded.parts == {"weight": f"{EXPERT}.weight", "scale": f"{EXPERT}.weight_scale_inv"}
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
    assert torch.equal(decode(encoded, tensors, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(64, 70), (33, 64), (5, 7), (576, 130)])
def test_ragged_blocks_as_compressed_tensors_reads_them(tmp_path, rows, columns, dtype):
    weight, scale = blockwise(rows, columns, 32)
    tensors = {f"{EXPERT}.weight": weight, f"{EXPERT}.weight_scale_inv": scale}
    reader = FP8BlockDequantizer(weight_block_size=(32, 32), dtype=dtype)
    expected = reader._create_dequantized_weight(weight, scale)
    assert torch.equal(decode(one(tmp_path, tensors, FP8), tensors, dtype), expected)


def test_blocks_are_128_wide_unless_the_config_says_otherwise(tmp_path):
    # 192 rows in two blocks are 128 and 64, not twice 96
    weight, scale = blockwise(192, 128, 128)
    tensors = {f"{EXPERT}.weight": weight, f"{EXPERT}.weight_scale_inv": scale}
    expected = FP8BlockDequantizer(dtype=torch.float32)._create_dequantized_weight(weight, scale)
    encoded = one(tmp_path, tensors, {"quant_method": "fp8"})
    assert torch.equal(decode(encoded, tensors, torch.float32), expected)


@pytest.mark.parametrize("spelling", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (64, 1), (64,)])
def test_scales_per_tensor_and_channel(tmp_path, spelling, shape):
    weight = torch.randn(64, 64).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.01
    tensors = {
        f"{EXPERT}.weight": weight,
        f"{EXPERT}.{spelling}": scale,
        f"{EXPERT}.input_scale": torch.ones(()),
        f"{EXPERT}.activation_scale": torch.ones(()),
    }
    encoded = one(tmp_path, tensors, FP8 | {"weight_block_size": None})
    assert encoded.parts["input_scale"] == f"{EXPERT}.input_scale"
    assert encoded.parts["activation_scale"] == f"{EXPERT}.activation_scale"
    expected = weight.float() * (scale[:, None] if scale.ndim == 1 else scale)
    assert torch.equal(decode(encoded, tensors, torch.float32), expected)


def test_exponents_stored_as_bytes(tmp_path):
    weight = torch.randn(32, 64).to(torch.float8_e4m3fn)
    scale = torch.randint(118, 130, (32, 2), dtype=torch.uint8)
    tensors = {f"{EXPERT}.weight": weight, f"{EXPERT}.weight_scale_inv": scale}
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(decode(one(tmp_path, tensors, FP8), tensors, torch.float32), expected)


def test_fp4_experts_beside_fp8(tmp_path):
    """DeepSeek-V4: E2M1 pairs with a power of two per 32 values, scales named ``scale``."""
    weight = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    scale = torch.randint(118, 130, (16, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors = {f"{EXPERT}.weight": weight, f"{EXPERT}.scale": scale}
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    encoded = one(tmp_path, tensors, {"quant_method": "fp8", "scale_fmt": "ue8m0"})
    assert encoded.shape == (16, 64)
    assert torch.equal(decode(encoded, tensors, torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_fp8_experts(tmp_path, dtype):
    tensors = fp8_quantized(FUSED, torch.randn(4, 64, 32), FP8)
    tensors[f"{FUSED}_activation_scale"] = torch.ones(4)
    encoded = one(tmp_path, tensors, FP8)
    assert encoded.name == FUSED
    assert encoded.parts["activation_scale"] == f"{FUSED}_activation_scale"
    whole = decode(encoded, tensors, dtype)
    expected = Fp8Dequantize(None)._dequantize_one(tensors[FUSED], tensors[f"{FUSED}_scale_inv"], dtype)
    assert torch.equal(whole, expected)
    assert_experts_are_slices(encoded, tensors, whole)


def assert_experts_are_slices(encoded: Encoded, tensors: Tensors, whole: torch.Tensor) -> None:
    assert encoded.codec.expert_axis == 0
    for expert in range(len(whole)):
        parts = {role: part[expert] for role, part in parts_of(encoded, tensors).items()}
        assert torch.equal(encoded.codec.decode(parts, whole.dtype), whole[expert])


@pytest.mark.parametrize("scale_shape", [(3,), (3, 1, 1)])
def test_fused_experts_with_a_scale_each(tmp_path, scale_shape):
    scale = torch.rand(scale_shape)
    tensors = {FUSED: torch.randn(3, 8, 8).to(torch.float8_e4m3fn), f"{FUSED}_scale_inv": scale}
    encoded = one(tmp_path, tensors, FP8 | {"weight_block_size": None})
    whole = decode(encoded, tensors, torch.float32)
    assert torch.equal(whole, tensors[FUSED].float() * scale.view(3, 1, 1))
    assert_experts_are_slices(encoded, tensors, whole)


def test_gate_and_up_keep_their_own_blocks_when_stacked(tmp_path):
    gate, gate_scale = blockwise(48, 32, 32)
    up, up_scale = blockwise(48, 32, 32)
    tensors = {
        FUSED: torch.cat([gate.view(torch.uint8), up.view(torch.uint8)])[None].view(torch.float8_e4m3fn),
        f"{FUSED}_scale_inv": torch.cat([gate_scale, up_scale])[None],
    }
    reader = FP8BlockDequantizer(weight_block_size=(32, 32), dtype=torch.float32)
    expected = torch.cat(
        [
            reader._create_dequantized_weight(gate, gate_scale),
            reader._create_dequantized_weight(up, up_scale),
        ]
    )
    encoded = one(tmp_path, tensors, FP8)
    whole = decode(encoded, tensors, torch.float32)
    assert torch.equal(whole[0], expected)
    assert_experts_are_slices(encoded, tensors, whole)


def test_fp8_model_as_transformers_loads_it(tmp_path):
    path = saved("qwen3_moe", tmp_path)
    tensors: Tensors = {}
    for name, value in load_file(path / "model.safetensors").items():
        quantizes = name.endswith("proj.weight")
        tensors |= fp8_quantized(name, value, FP8) if quantizes else {name: value}
    write(path, tensors, FP8)
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype)
        found, claimed = logical_tensors(read_layout(path), FP8)
        assert claimed == {n for n in tensors if n.endswith(("proj.weight", "_scale_inv"))}
        assert_model_has(model, {name: decode(e, tensors, dtype) for name, e in found.items()})


def write(path: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))


def assert_model_has(model: nn.Module, decoded: Tensors) -> None:
    """Decoded per-expert weights are the slices of a model's fused ones, everything else is its own."""
    state = model.state_dict()
    compared = 0
    for name, value in decoded.items():
        before, experts, after = name.partition(".experts.")
        if not experts:
            expected = state[name]
        else:
            expert, projection, _ = after.split(".")
            if projection == "down_proj":
                expected = state[f"{before}.experts.down_proj"][int(expert)]
            else:
                both = state[f"{before}.experts.gate_up_proj"][int(expert)]
                expected = both.chunk(2)[projection == "up_proj"]
        assert torch.equal(value, expected), name
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpt_oss_blocks(tmp_path, dtype):
    tensors = mxfp4(FUSED, 3, 16, 2)
    tensors[f"{FUSED}_bias"] = torch.zeros(3, 16, dtype=torch.bfloat16)
    encoded = one(tmp_path, tensors, {"quant_method": "mxfp4"})
    assert encoded.name == FUSED
    whole = decode(encoded, tensors, dtype)
    expected = convert_moe_packed_tensors(tensors[f"{FUSED}_blocks"], tensors[f"{FUSED}_scales"], dtype=dtype)
    assert whole.shape == (3, 64, 16)
    assert torch.equal(whole, expected)
    assert_experts_are_slices(encoded, tensors, whole)


def mxfp4(name: str, experts: int, rows: int, groups: int) -> Tensors:
    return {
        f"{name}_blocks": torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8),
        f"{name}_scales": torch.randint(118, 128, (experts, rows, groups), dtype=torch.uint8),
    }


def test_gpt_oss_model_as_transformers_loads_it(tmp_path):
    path = saved("gpt_oss", tmp_path)
    tensors: Tensors = {}
    fused = {}
    for name, value in load_file(path / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = value.shape
            tensors |= mxfp4(name, experts, rows, columns // 32)
            fused[name] = value.shape
        else:
            tensors[name] = value
    write(path, tensors, {"quant_method": "mxfp4"})
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    found, _ = logical_tensors(read_layout(path), {"quant_method": "mxfp4"})
    assert {name: encoded.shape for name, encoded in found.items()} == fused
    for name, encoded in found.items():
        assert torch.equal(decode(encoded, tensors, torch.bfloat16), model.state_dict()[name])


def ints(bits: int, **options: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, type="int", **options)


def floats(bits: int, **options: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, type="float", **options)


INPUT_INT8 = ints(8, strategy="token", dynamic=True)
INPUT_FP8 = floats(8, strategy="tensor", dynamic=False)
# name -> weights, inputs, rows, columns, format it is stored in
COMPRESSED = {
    "w4-group": (ints(4, strategy="group", group_size=32), None, 24, 64, "pack-quantized"),
    "w4-group-asymmetric": (
        ints(4, strategy="group", group_size=32, symmetric=False),
        None,
        20,
        64,
        "pack-quantized",
    ),
    "w4-channel-asymmetric": (ints(4, strategy="channel", symmetric=False), None, 20, 40, "pack-quantized"),
    "w8-channel": (ints(8, strategy="channel"), None, 24, 44, "pack-quantized"),
    "w8-group-asymmetric": (
        ints(8, strategy="group", group_size=16, symmetric=False),
        None,
        6,
        48,
        "pack-quantized",
    ),
    "w3-group": (ints(3, strategy="group", group_size=32), None, 8, 96, "pack-quantized"),
    "fp8-tensor": (floats(8, strategy="tensor"), INPUT_FP8, 24, 40, "float-quantized"),
    "fp8-channel": (floats(8, strategy="channel"), INPUT_INT8, 24, 24, "float-quantized"),
    "fp8-block": (
        floats(8, strategy="block", block_structure=[32, 32]),
        INPUT_FP8,
        64,
        96,
        "float-quantized",
    ),
    "fp8-block-ragged": (
        floats(8, strategy="block", block_structure=[32, 32]),
        INPUT_FP8,
        40,
        72,
        "float-quantized",
    ),
    "int8-channel": (ints(8, strategy="channel"), INPUT_INT8, 24, 40, "int-quantized"),
    "int8-channel-asymmetric": (
        ints(8, strategy="channel", symmetric=False),
        INPUT_INT8,
        24,
        40,
        "int-quantized",
    ),
    "naive-int4": (ints(4, strategy="group", group_size=16), None, 24, 48, "naive-quantized"),
    "nvfp4": (
        floats(4, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn),
        floats(4, strategy="tensor_group", group_size=16, dynamic="local"),
        24,
        64,
        "nvfp4-pack-quantized",
    ),
    "mxfp4": (
        floats(4, strategy="group", group_size=32, scale_dtype=torch.uint8),
        None,
        24,
        64,
        "mxfp4-pack-quantized",
    ),
    "mxfp8": (
        floats(8, strategy="group", group_size=32, scale_dtype=torch.uint8),
        None,
        24,
        64,
        "mxfp8-quantized",
    ),
}


def compressed_linear(scheme: QuantizationScheme, rows: int, columns: int, dtype: torch.dtype) -> nn.Linear:
    """A Linear with random scales and zero points, as compressed-tensors stores it."""
    linear = nn.Linear(columns, rows, bias=True, dtype=dtype)
    initialize_module_for_quantization(linear, scheme, force_zero_point=not scheme.weights.symmetric)
    weights = scheme.weights
    for name, value in linear.named_parameters():
        if name.endswith("zero_point"):
            limit = 2 ** (weights.num_bits - 1)
            value.data = torch.randint(-limit, limit, value.shape).to(value.dtype)
        elif name.endswith("global_scale"):
            value.data = torch.rand(value.shape) * 100 + 500
        elif weights.scale_dtype is torch.uint8 and name == "weight_scale":
            value.data = torch.exp2(torch.randint(-9, -2, value.shape).float()).to(value.dtype)
        elif name.endswith("scale"):
            value.data = (torch.rand(value.shape) * 0.01 + 0.01).to(value.dtype)
            if weights.num_bits == 4 and weights.type == "float":
                value.data = (value.data * 1000).to(torch.float8_e4m3fn).to(value.dtype)
    compress_module(linear)
    return linear


def ct_config(**groups: QuantizationScheme) -> dict[str, Any]:
    form = {scheme.format for scheme in groups.values()}
    stated = form.pop() if len(form) == 1 else "mixed-precision"
    config = QuantizationConfig(config_groups=groups, format=stated, quantization_status="compressed")
    return json.loads(config.model_dump_json())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors(tmp_path, case, dtype):
    weights, inputs, rows, columns, form = COMPRESSED[case]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=form)
    linear = compressed_linear(scheme, rows, columns, dtype)
    tensors = {f"{EXPERT}.{name}": value.contiguous() for name, value in linear.state_dict().items()}
    encoded = one(tmp_path, tensors, ct_config(group_0=scheme))
    assert encoded.name == f"{EXPERT}.weight"
    assert encoded.shape == (rows, columns)
    assert encoded.parts == {n.rpartition(".")[2]: n for n in tensors if not n.endswith(".bias")}
    assert encoded.codec.expert_axis is None

    upstream = copy.deepcopy(linear)
    decompress_module(upstream)
    # upstream has bfloat16 only for FP4
    exact = torch.bfloat16 if "fp4" in form else dtype
    assert upstream.weight.dtype is exact or case == "mxfp8"
    assert torch.equal(decode(encoded, tensors, exact), upstream.weight.to(exact))
    assert torch.equal(decode(encoded, tensors, torch.float32).to(exact), upstream.weight.to(exact))
    assert upstream.weight.float().std() > 0.01


def test_kimi_k2_without_shapes(tmp_path):
    scheme = QuantizationScheme(
        targets=["Linear"], weights=COMPRESSED["w4-group"][0], format="pack-quantized"
    )
    linear = compressed_linear(scheme, 16, 64, torch.bfloat16)
    upstream = copy.deepcopy(linear)
    decompress_module(upstream)
    tensors = {
        f"{EXPERT}.{name}": linear.get_parameter(name).data for name in ("weight_packed", "weight_scale")
    }
    encoded = one(tmp_path, tensors, ct_config(group_0=scheme))
    assert torch.equal(decode(encoded, tensors, torch.bfloat16), upstream.weight)


def test_channel_scales_without_a_second_axis(tmp_path):
    scheme = QuantizationScheme(
        targets=["Linear"], weights=floats(8, strategy="channel"), format="float-quantized"
    )
    weight, scale = torch.randn(16, 16).to(torch.float8_e4m3fn), torch.rand(16)
    tensors = {f"{EXPERT}.weight": weight, f"{EXPERT}.weight_scale": scale}
    encoded = one(tmp_path, tensors, ct_config(group_0=scheme))
    assert torch.equal(decode(encoded, tensors, torch.float32), weight.float() * scale[:, None])


def test_activation_ordering_of_earlier_releases(tmp_path):
    weights = ints(4, strategy="group", group_size=16, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    values = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    zero_point = torch.randint(-8, 8, (16, 4), dtype=torch.int8)
    scale = torch.rand(16, 4)
    groups = (torch.randperm(64) // 16).to(torch.int32)
    tensors = {
        f"{EXPERT}.weight_packed": pack_to_int32(values, 4),
        f"{EXPERT}.weight_scale": scale,
        f"{EXPERT}.weight_zero_point": pack_to_int32(zero_point, 4, packed_dim=0).contiguous(),
        f"{EXPERT}.weight_g_idx": groups,
        f"{EXPERT}.weight_shape": torch.tensor([16, 64]),
    }
    encoded = one(tmp_path, tensors, ct_config(group_0=scheme))
    expected = (values.float() - zero_point[:, groups].float()) * scale[:, groups]
    assert torch.equal(decode(encoded, tensors, torch.float32), expected)


def test_mixed_precision_model_as_transformers_loads_it(tmp_path):
    path = saved("qwen3_moe", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    groups = {
        "experts": QuantizationScheme(
            targets=[r"re:.*experts\.\d+\.(gate|up|down)_proj$"],
            weights=ints(4, strategy="group", group_size=32),
        ),
        "attention": QuantizationScheme(
            targets=[r"re:.*self_attn\.[qkvo]_proj$"],
            weights=floats(8, strategy="channel"),
            input_activations=floats(8, strategy="token", dynamic=True),
        ),
    }
    oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=[r"re:.*\.1\.self_attn.*"]))
    target = tmp_path / "compressed"
    model.save_pretrained(target, save_compressed=True)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"

    tensors = load_file(target / "model.safetensors")
    found, claimed = logical_tensors(read_layout(target), config)
    assert not any(".layers.1.self_attn" in name for name in found)
    assert {name.rpartition(".")[2] for name in set(tensors) - claimed} == {"weight"}
    assert {type(encoded.codec).__name__ for encoded in found.values()} == {"PackedInt", "ScaledFp8"}
    loaded = AutoModelForCausalLM.from_pretrained(
        target, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    )
    assert_model_has(loaded, {name: decode(e, tensors, torch.bfloat16) for name, e in found.items()})


def packed(scheme: QuantizationScheme) -> Tensors:
    state = compressed_linear(scheme, 8, 32, torch.float32).state_dict()
    return {f"{EXPERT}.{name}": value for name, value in state.items()}


def w4(*targets: str, **options: Any) -> QuantizationScheme:
    weights = ints(4, strategy="group", group_size=32, **options)
    return QuantizationScheme(targets=list(targets), weights=weights, format="pack-quantized")


def test_names_that_only_the_model_has_still_mean_the_one_scheme(tmp_path):
    scheme = w4(r"re:.*block_sparse_moe\.experts\.\d+\.w1$")
    assert one(tmp_path, packed(scheme), ct_config(group_0=scheme)).name == f"{EXPERT}.weight"


def test_scales_of_the_cache_are_plain(tmp_path):
    scheme = w4("Linear")
    tensors = packed(scheme) | {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    assert "k_scale" not in one(tmp_path, tensors, ct_config(group_0=scheme)).parts


def refused(directory: Path, tensors: Tensors, config: dict[str, Any] | None) -> str:
    with pytest.raises(UnreadablePrecisionError) as refusal:
        logical_tensors(stored(directory, tensors), config)
    return str(refusal.value)


def without(tensors: Tensors, local: str) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.endswith(f".{local}")}


def test_config_and_tensors_that_contradict_each_other_are_refused(tmp_path):
    scheme = w4("Linear")
    tensors, config = packed(scheme), ct_config(group_0=scheme)
    message = refused(tmp_path, tensors, config | {"ignore": [EXPERT]})
    assert EXPERT in message
    assert "quantization_config.ignore" in message
    message = refused(tmp_path, tensors, ct_config(a=w4("re:.*q_proj"), b=w4("re:.*k_proj", symmetric=False)))
    assert EXPERT in message
    assert "config_groups" in message
    message = refused(tmp_path, without(tensors, "weight_scale"), config)
    assert f"{EXPERT}.weight_packed" in message
    assert f"{EXPERT}.weight_scale" in message
    asymmetric = ct_config(group_0=w4("Linear", symmetric=False))
    assert "asymmetric int weights of 4 bits" in refused(tmp_path, tensors, asymmetric)
    eight = w4("Linear")
    eight.weights.num_bits = 8
    assert "weights of 8 bits" in refused(tmp_path, tensors, ct_config(group_0=eight))
    assert "config.json" in refused(tmp_path, tensors, config | {"config_groups": {"a": {"targets": 3}}})
    assert "config.json" in refused(tmp_path, tensors, config | {"ignore": ["re:("]})


@pytest.mark.parametrize("config", [None, FP8, ct_config(group_0=w4("Linear"))])
def test_fp8_without_its_scale_is_refused(tmp_path, config):
    message = refused(tmp_path, {f"{EXPERT}.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, config)
    assert f"{EXPERT}.weight " in message
    assert f"{EXPERT}.weight_scale" in message


def test_fp8_scales_that_do_not_fit_are_refused(tmp_path):
    weight, _ = blockwise(64, 64, 32)
    message = refused(
        tmp_path, {f"{EXPERT}.weight": weight, f"{EXPERT}.weight_scale_inv": torch.ones(3, 2)}, FP8
    )
    assert f"{EXPERT}.weight_scale_inv" in message
    assert "[3, 2]" in message
    assert "weight_block_size" in message
    for block in ([128], 128, [128, 0]):
        assert "weight_block_size" in refused(tmp_path, {}, FP8 | {"weight_block_size": block})


def test_undeclared_fp8_is_refused(tmp_path):
    weight, scale = blockwise(32, 32, 32)
    message = refused(tmp_path, {f"{EXPERT}.weight": weight, f"{EXPERT}.weight_scale_inv": scale}, None)
    assert f"{EXPERT}.weight_scale_inv" in message
    assert "quantization_config" in message


def test_gpt_oss_blocks_without_scales_are_refused(tmp_path):
    tensors = mxfp4(FUSED, 2, 8, 1)
    scales = tensors.pop(f"{FUSED}_scales")
    message = refused(tmp_path, tensors, {"quant_method": "mxfp4"})
    assert f"{FUSED}_blocks" in message
    assert f"{FUSED}_scales" in message
    wrong = tensors | {f"{FUSED}_scales": scales[:1].clone()}
    assert "[1, 8, 1]" in refused(tmp_path, wrong, {"quant_method": "mxfp4"})
    twice = tensors | {f"{FUSED}_scales": scales, FUSED: torch.zeros(2, 32, 8)}
    assert "stored twice" in refused(tmp_path, twice, {"quant_method": "mxfp4"})


@pytest.mark.parametrize(
    ("config", "named", "way_out"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", "GPTQModifier"),
        ({"quant_method": "awq"}, "awq", "AutoAWQConverter"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "dequantize"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt", "ModelOptNvfp4Converter"),
        ({"quant_method": "modelopt_fp4"}, "modelopt_fp4", "ModelOptNvfp4Converter"),
        ({"producer": {"name": "modelopt"}, "quant_algo": "FP8"}, "modelopt", "unquantized release"),
        ({"quant_method": "auto-round"}, "auto-round", "llm_compressor"),
        ({"quant_method": "intel/auto-round"}, "intel/auto-round", "llm_compressor"),
        ({"quant_method": "quark"}, "quark", "unquantized release"),
        ({"bits": 4}, "None", "unquantized release"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24", "unquantized release"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
            "unquantized release",
        ),
    ],
)
def test_unreadable_methods_are_refused_by_name(config, named, way_out):
    with pytest.raises(UnreadablePrecisionError, match="quant_method") as refusal:
        refuse_unreadable(config, "models/some")
    message = str(refusal.value)
    assert message.startswith("models/some: ")
    assert named in message
    assert way_out in message


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "compressed-tensors"])
def test_readable_methods_pass(method):
    refuse_unreadable({"quant_method": method, "sparsity_config": {}}, "models/some")
