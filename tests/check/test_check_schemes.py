"""Which experts, routers and merged projections may have which quantization scheme."""

import pytest
import torch
from breaking import codes, edit_tensors, errors, finding
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from compressing import NATIVE, change_config, decompress, repack, split_groups, w4
from transformers import AutoModelForCausalLM

from llmcompressor_moe.check import check_checkpoint


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


def test_two_groups_name_the_same_experts(quantized):
    path = quantized("qwen3_moe")
    split_groups(path, (r"re:.*experts.*", {}), (r"re:.*mlp.experts.*", {"group_size": 64}))
    assert "quant-ambiguous" in codes(check_checkpoint(path), "warning")


def test_quantized_experts_of_a_family_that_fuses_them(compressed):
    report = check_checkpoint(compressed("granitemoe", "W4A16"))
    assert report.ok
    assert "quant-fused-family" in codes(report, "warning")
