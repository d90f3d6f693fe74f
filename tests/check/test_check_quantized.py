"""Compressed checkpoints as llm-compressor's oneshot writes them, and what can go wrong with them."""

import json
import re
import shutil

import pytest
import support
import torch
from breaking import (
    codes,
    drop,
    edit_json,
    edit_tensors,
    errors,
    finding,
    rename,
    set_config,
)
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from compressing import NATIVE, SCHEMES, change_config, decompress, w4
from llmcompressor import oneshot
from llmcompressor.modeling.moe.conversion_mappings import get_linearize_load_mappings
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, conversion_mapping

from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.check.schemes import CompressedParameters, read_schemes
from llmcompressor_moe.checkpoint.layout import read_layout


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_what_oneshot_writes_is_legal(compressed, model_type, scheme):
    report = check_checkpoint(compressed(model_type, scheme))
    assert codes(report) | codes(report, "note") == set()
    # transformers alone fails on int8 experts and on zero points; vLLM does not
    beyond = {"transformers-experts"} if scheme in ("W4A16_ASYM", "W8A8") else set()
    assert codes(report, "warning") == beyond


@pytest.mark.parametrize("scheme", [*SCHEMES, "MXFP8A16"])
def test_transformers_fails_exactly_where_the_check_says_so(compressed, scheme):
    path = compressed("qwen3_moe", scheme)
    warned = "transformers-experts" in codes(check_checkpoint(path), "warning")
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except RuntimeError:
        assert warned
    else:
        assert not warned


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_transformers_runs_fp4_exactly_where_the_check_does_not_warn(compressed, tmp_path, dtype):
    """Its Linears; its experts are another matter."""
    path = shutil.copytree(compressed("qwen3_moe", "NVFP4A16"), tmp_path / "copy")
    set_config(path, dtype=str(dtype).removeprefix("torch."))
    warned = "transformers-dtype" in codes(check_checkpoint(path), "warning")
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    attention = model.model.layers[0].self_attn
    model.hf_quantizer.compressor.decompress_model(model)
    assert model.dtype == dtype
    assert (attention.q_proj.weight.dtype == dtype) is not warned


def test_compressed_mixtral_as_oneshot_names_it(quantized):
    path = quantized()
    back = {native: name for name, native in NATIVE.items()}
    rename(path, lambda n: re.sub(r"experts\.(\d+)\.(w\d)", lambda m: f"experts.{m[1]}.{back[m[2]]}", n))
    found = finding(path, "expert-names")
    assert errors(path) == {"expert-names"}
    assert "288 expert tensors" in found.message  # the number that transformers 5.17 leaves unused


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_shape"])
def test_every_part_of_a_compressed_weight_is_demanded(quantized, model_type, leaf):
    path = quantized(model_type)
    expert = "block_sparse_moe.experts.3.w1" if model_type == "mixtral" else "mlp.experts.3.gate_proj"
    drop(path, f"layers.2.{expert}.{leaf}")
    assert not check_checkpoint(path).ok


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "FP8", "W8A8"])
def test_scales_and_zero_points_are_demanded(quantized, scheme):
    leaf = {"W4A16_ASYM": "weight_zero_point", "FP8": "input_scale", "W8A8": "weight_scale"}[scheme]
    path = quantized("qwen3_moe", scheme)
    drop(path, f"layers.1.self_attn.q_proj.{leaf}")
    assert finding(path, "tensor-missing").subject == f"model.layers.1.self_attn.q_proj.{leaf}"


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale"])
def test_compressed_tensor_of_another_shape(quantized, leaf):
    path = quantized()
    name = f"model.layers.1.self_attn.q_proj.{leaf}"
    edit_tensors(path, lambda t: t.update({name: t[name][:, :1]}))
    assert finding(path, "tensor-shape").subject == name


def test_group_size_in_the_config_lies(quantized):
    path = quantized()
    change_config(path, lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=64))
    assert errors(path) == {"tensor-shape"}


def test_original_shape_inside_the_files_lies(quantized):
    path = quantized()
    name = "model.layers.1.block_sparse_moe.experts.0.w1.weight_shape"
    edit_tensors(path, lambda t: t.update({name: torch.tensor([64, 32])}))
    assert finding(path, "quant-weight-shape").subject == name
    assert errors(path) == {"quant-weight-shape"}


def test_named_quantized_but_stored_plain_and_the_reverse(quantized):
    path = quantized("qwen3_moe")
    module = "model.layers.1.mlp.experts.0.down_proj"
    edit_tensors(path, lambda t: decompress(t, module))
    assert finding(path, "quant-stored-plain").subject == module
    path = quantized("qwen3_moe")
    change_config(path, lambda q: q["ignore"].append("re:.*layers.1.mlp.experts.*"))
    assert finding(path, "quant-unexpected").subject.startswith("model.layers.1.mlp.experts")
    assert errors(path) == {"quant-unexpected"}


def test_eight_bit_weights_stored_plain(quantized):
    path = quantized("qwen3_moe", "W8A8")
    module = "model.layers.1.self_attn.o_proj"
    drop(path, f"{module}.weight_scale")
    edit_tensors(path, lambda t: t.update({f"{module}.weight": t[f"{module}.weight"].float()}))
    assert finding(path, "quant-stored-plain").subject == module


def test_compressed_without_saying_so(quantized):
    path = quantized()
    edit_json(path / "config.json", lambda c: c.pop("quantization_config"))
    assert "quant-undeclared" in errors(path)


def test_group_size_that_does_not_divide(quantized):
    path = quantized("qwen3_moe")
    change_config(path, lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=48))
    assert "quant-size" in errors(path)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda q: q["ignore"].append("re:("), "quant-config-illegal"),
        (lambda q: q.update(config_groups=3), "quant-config-illegal"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits="four"), "quant-config-illegal"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group"), "quant-config-illegal"),
        (lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}), "quant-sparsity"),
    ],
)
def test_quantization_config_that_readers_refuse(quantized, change, code):
    path = quantized("qwen3_moe")
    change_config(path, change)
    assert code in errors(path)


def test_quantization_config_that_is_no_object(quantized):
    path = quantized("qwen3_moe")
    set_config(path, quantization_config=[1])
    assert not check_checkpoint(path).ok


def test_foreign_quantization_is_said_to_be_unchecked(good):
    path = good()
    set_config(path, quantization_config={"quant_method": "fp8"})
    assert codes(check_checkpoint(path), "warning") == {"quant-method-unknown"}


def test_names_left_over_after_a_cut(quantized):
    path = quantized("qwen3_moe")
    change_config(path, lambda q: q["ignore"].append("model.layers.7.mlp.gate"))
    report = check_checkpoint(path)
    assert report.ok
    assert codes(report, "note") == {"quant-name-stale"}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_expected_parameters_equal_a_real_compression(bits, symmetric):
    scheme = w4(bits=bits, symmetric=symmetric)
    written = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": json.loads(scheme.model_dump_json())},
    }
    schemes = read_schemes(written, Findings())
    linear = torch.nn.Linear(128, 96, bias=True)
    initialize_module_for_quantization(linear, scheme)
    linear.weight_scale.data.fill_(0.01)
    compress_module(linear)
    real = {name: tuple(value.shape) for name, value in linear.state_dict().items()}
    assert {n: s for n, (s, _) in CompressedParameters(schemes).of(128, 96, True, 0).items()} == real


def test_mappings_that_llm_compressor_overwrote_in_this_process_do_not_matter(good, monkeypatch):
    path = good("qwen2_moe")
    # what load_quantizable_moe() does, and never undoes
    cache = dict(conversion_mapping._checkpoint_conversion_mapping_cache)
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", cache)
    _, load_map, _ = get_linearize_load_mappings("qwen2_moe")
    conversion_mapping.register_checkpoint_conversion_mapping("qwen2_moe", load_map, overwrite=True)
    assert check_checkpoint(path).findings == []


def test_cache_scales_belong_to_the_cache_scheme(tmp_path):
    model = support.load(support.saved("qwen3_moe", tmp_path))
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    recipe = QuantizationModifier(
        config_groups={"a": w4()}, ignore=["lm_head", "re:.*gate$"], kv_cache_scheme=cache
    )
    data = {"dataset": support.dataset(), "num_calibration_samples": 4, "max_seq_length": 32}
    out = tmp_path / "out"
    oneshot(model=model, recipe=recipe, tokenizer=support.tokenizer(), output_dir=str(out), **data)
    assert any(name.endswith("self_attn.k_scale") for name in read_layout(out).tensors)
    assert check_checkpoint(out).findings == []
    change_config(out, lambda q: q.update(kv_cache_scheme=None))
    assert finding(out, "tensor-extra").subject.endswith("_scale")


def test_quantized_but_not_compressed(tmp_path):
    model = support.load(support.saved("qwen3_moe", tmp_path))
    recipe = QuantizationModifier(config_groups={"a": w4()}, ignore=["lm_head", "re:.*gate$"])
    oneshot(model=model, recipe=recipe, tokenizer=support.tokenizer())
    model.save_pretrained(tmp_path / "out", save_compressed=False)
    assert "quant-not-compressed" in codes(check_checkpoint(tmp_path / "out"), "warning")
