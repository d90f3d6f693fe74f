"""Compressed checkpoints as llm-compressor's oneshot writes them, and what can go wrong with them."""

import copy
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
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from llmcompressor import oneshot
from llmcompressor.modeling.moe.conversion_mappings import get_linearize_load_mappings
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, conversion_mapping

from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.check.schemes import CompressedParameters, read_schemes

NATIVE = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
PLAIN = ["lm_head", "re:.*gate$", "re:.*shared_expert_gate$"]
EXPERT = re.compile(r"experts\.(\d+)\.(gate_proj|up_proj|down_proj)")


def w4(targets=("Linear",), bits: int = 4, group: int = 32, symmetric: bool = True) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group
    )
    return QuantizationScheme(targets=list(targets), weights=weights)


SCHEMES = {
    "W4A16": {"config_groups": {"a": w4()}},
    "W4A16_ASYM": {"config_groups": {"a": w4(symmetric=False)}},
    "W8A8": {"targets": "Linear", "scheme": "W8A8"},
    "FP8": {"targets": "Linear", "scheme": "FP8"},
    "FP8_DYNAMIC": {"targets": "Linear", "scheme": "FP8_DYNAMIC"},
}


def to_native(path) -> None:
    """Give Mixtral's experts their own names."""
    rename(path, lambda name: EXPERT.sub(lambda m: f"experts.{m[1]}.{NATIVE[m[2]]}", name))


@pytest.fixture(scope="session")
def compressed(tmp_path_factory):
    """Make a compressed checkpoint once, hand out copies."""
    made = tmp_path_factory.mktemp("compressed")

    def make(model_type: str, scheme: str):
        path = made / f"{model_type}-{scheme}"
        if not path.exists():
            # oneshot looks into the directory that the model came from
            model = support.load(support.saved(model_type, made / "source"))
            recipe = QuantizationModifier(ignore=PLAIN, **copy.deepcopy(SCHEMES[scheme]))
            data = {"dataset": support.dataset(), "num_calibration_samples": 4, "max_seq_length": 32}
            oneshot(
                model=model,
                recipe=recipe,
                tokenizer=support.tokenizer(),
                output_dir=str(path),
                **(data if scheme == "FP8" else {}),
            )
            if model_type == "mixtral":
                to_native(path)
        return path

    return make


@pytest.fixture
def quantized(compressed, tmp_path):
    def fresh(model_type: str = "mixtral", scheme: str = "W4A16"):
        return shutil.copytree(compressed(model_type, scheme), tmp_path / f"{len(list(tmp_path.iterdir()))}")

    return fresh


def change_config(path, change) -> None:
    edit_json(path / "config.json", lambda config: change(config["quantization_config"]))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_what_oneshot_writes_is_legal(compressed, model_type, scheme):
    report = check_checkpoint(compressed(model_type, scheme))
    assert codes(report) | codes(report, "note") == set()
    # transformers alone fails on int8 experts and on zero points; vLLM does not
    beyond = {"transformers-experts"} if scheme in ("W4A16_ASYM", "W8A8") else set()
    assert codes(report, "warning") == beyond


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_fails_exactly_where_the_check_says_so(compressed, scheme):
    path = compressed("qwen3_moe", scheme)
    warned = "transformers-experts" in codes(check_checkpoint(path), "warning")
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except RuntimeError:
        assert warned
    else:
        assert not warned


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


def decompress(tensors: dict[str, torch.Tensor], module: str) -> None:
    for leaf in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{module}.{leaf}"]
    tensors[f"{module}.weight"] = torch.zeros(64, 64)


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


def split_groups(path, *rules: tuple[str, dict]) -> None:
    """Put a group before the first for each (target, weights)."""

    def change(q):
        base = q["config_groups"].pop("group_0")
        for index, (target, weights) in enumerate(rules):
            group = copy.deepcopy(base)
            group["targets"] = [target]
            group["weights"].update(weights)
            q["config_groups"][f"special_{index}"] = group
        q["config_groups"]["group_0"] = base

    change_config(path, change)


def repack(path, modules: str, bits: int, group: int) -> None:
    """Store matching modules at another precision, by compressed-tensors itself."""

    def change(tensors):
        for name in [n for n in tensors if re.search(modules + r"\.weight_packed$", n)]:
            module = name.removesuffix(".weight_packed")
            linear = torch.nn.Linear(64, 64, bias=False)
            initialize_module_for_quantization(linear, w4(bits=bits, group=group))
            linear.weight_scale.data.fill_(0.1)
            compress_module(linear)
            tensors |= {f"{module}.{k}": v.data for k, v in linear.state_dict().items()}

    edit_tensors(path, change)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_layers_may_differ_in_bits_and_group_size(quantized, model_type):
    path = quantized(model_type)
    split_groups(
        path,
        (r"re:.*layers\.1\..*experts.*", {"num_bits": 8}),
        (r"re:.*layers\.2\..*experts.*", {"group_size": 64}),
    )
    repack(path, r"layers\.1\..*experts.*", 8, 32)
    repack(path, r"layers\.2\..*experts.*", 4, 64)
    report = check_checkpoint(path)
    assert report.ok
    assert codes(report, "warning") == {"transformers-experts"}


def test_different_bits_inside_a_layer(quantized):
    path = quantized("qwen3_moe")
    split_groups(path, (r"re:.*layers\.1\..*experts\.3\..*", {"num_bits": 8}))
    repack(path, r"layers\.1\..*experts\.3\..*", 8, 32)
    found = finding(path, "moe-mixed-schemes")
    assert errors(path) == {"moe-mixed-schemes"}
    assert found.subject == "layer 1"


def test_different_group_sizes_inside_a_layer(quantized):
    path = quantized()
    split_groups(path, (r"re:.*layers\.1\..*(down_proj|w2)$", {"group_size": 64}))
    repack(path, r"layers\.1\..*w2", 4, 64)
    assert errors(path) == {"moe-mixed-group-size"}
    assert "silently" in finding(path, "moe-mixed-group-size").message


def test_some_experts_plain(quantized):
    path = quantized("qwen3_moe")
    change_config(path, lambda q: q["ignore"].append(r"re:.*layers\.1\.mlp\.experts\.0\..*"))
    modules = [f"model.layers.1.mlp.experts.0.{role}" for role in NATIVE]
    edit_tensors(path, lambda t: [decompress(t, module) for module in modules])
    assert errors(path) == {"moe-partly-quantized"}


def test_whole_layer_plain_is_fine_for_vllm(quantized):
    path = quantized("qwen3_moe")
    change_config(path, lambda q: q["ignore"].append(r"re:.*layers\.1\.mlp\.experts.*"))
    modules = [f"model.layers.1.mlp.experts.{e}.{role}" for e in range(8) for role in NATIVE]
    edit_tensors(path, lambda t: [decompress(t, module) for module in modules])
    report = check_checkpoint(path)
    assert report.ok
    assert [f.code for f in report.findings] == ["transformers-experts"]
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert len(info["missing_keys"]) == 2  # both fused tensors of layer 1 stay random


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3")])
def test_names_that_cover_one_naming_only(quantized, names):
    path = quantized()
    change_config(path, lambda q: q["ignore"].extend(rf"re:.*layers\.1\..*{name}$" for name in names))
    modules = [
        f"model.layers.1.block_sparse_moe.experts.{e}.{leaf}" for e in range(8) for leaf in NATIVE.values()
    ]
    edit_tensors(path, lambda t: [decompress(t, module) for module in modules])
    report = check_checkpoint(path)
    if names[0] == "w1":
        assert report.ok
    else:
        # vLLM looks the scheme up under w1, w3 and w2
        assert codes(report) == {"quant-stored-plain"}
        assert "both namings" in report.errors[0].way_out
    assert "quant-names-one-sided" in codes(report, "warning")


def test_router_stored_quantized(quantized):
    path = quantized("qwen3_moe")

    def change(tensors):
        linear = torch.nn.Linear(64, 8, bias=False)
        initialize_module_for_quantization(linear, w4())
        compress_module(linear)
        gate = "model.layers.1.mlp.gate"
        del tensors[f"{gate}.weight"]
        tensors |= {f"{gate}.{k}": v.data for k, v in linear.state_dict().items()}

    edit_tensors(path, change)
    assert finding(path, "router-quantized").subject == "model.layers.1.mlp.gate"


def test_router_that_the_config_quantizes(quantized):
    path = quantized("qwen3_moe")
    change_config(path, lambda q: q.update(ignore=["lm_head"]))
    assert errors(path) == {"router-not-ignored"}


def test_router_that_is_ignored_under_a_name_that_vllm_does_not_know(quantized):
    path = quantized("mixtral")
    names = [f"model.layers.{i}.mlp.gate" for i in range(4)]
    change_config(path, lambda q: q.update(ignore=["lm_head", *names]))
    report = check_checkpoint(path)
    assert codes(report, "warning") | codes(report) == {"quant-names-one-sided"}
    assert "block_sparse_moe.gate" in report.findings[0].way_out


def test_shared_expert_gate_that_the_config_quantizes(quantized):
    path = quantized("qwen2_moe")
    change_config(path, lambda q: q.update(ignore=[n for n in q["ignore"] if "shared_expert_gate" not in n]))
    found = finding(path, "router-not-ignored")
    assert "shared_expert_gate" in found.message


def test_projections_that_vllm_merges_differ(quantized):
    path = quantized("qwen3_moe")
    split_groups(path, (r"re:.*layers\.1\..*k_proj$", {"group_size": 64}))
    repack(path, r"layers\.1\.self_attn\.k_proj", 4, 64)

    def rows(tensors):  # k_proj has one head of 32
        for leaf in ("weight_packed", "weight_scale"):
            name = f"model.layers.1.self_attn.k_proj.{leaf}"
            tensors[name] = tensors[name][:32]
        tensors["model.layers.1.self_attn.k_proj.weight_shape"] = torch.tensor([32, 64])

    edit_tensors(path, rows)
    assert errors(path) == {"linear-mixed-schemes"}


def test_tensor_parallel_tears_a_group(quantized):
    path = quantized()
    assert errors(path, tensor_parallel=2) == set()
    path = quantized("olmoe")
    split_groups(path, (r"re:.*experts.*", {"group_size": 64}))
    repack(path, r"experts.*", 4, 64)
    assert errors(path) == set()
    assert errors(path, tensor_parallel=2) == {"parallel-group-size"}
    assert errors(path, tensor_parallel=2, expert_parallel=2) == set()


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


def test_two_groups_name_the_same_experts(quantized):
    path = quantized("qwen3_moe")
    split_groups(path, (r"re:.*experts.*", {}), (r"re:.*mlp.experts.*", {"group_size": 64}))
    assert "quant-ambiguous" in codes(check_checkpoint(path), "warning")


def test_quantized_experts_of_a_family_that_fuses_them(compressed):
    report = check_checkpoint(compressed("granitemoe", "W4A16"))
    assert report.ok
    assert "quant-fused-family" in codes(report, "warning")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_expected_parameters_equal_a_real_compression(bits, symmetric):
    scheme = w4(bits=bits, symmetric=symmetric)
    written = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": json.loads(scheme.model_dump_json())},
    }
    schemes = read_schemes({"quantization_config": written}, Findings())
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
