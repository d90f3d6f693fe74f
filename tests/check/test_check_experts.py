"""Expert counts, routers, groups, layers that differ, draft layers, and splitting over devices."""

import json
import re

import pytest
import support
import torch
from breaking import codes, drop, edit_json, edit_tensors, errors, finding, set_config

from llmcompressor_moe.check import check_checkpoint

NUMBER = "num_local_experts"


def keep_experts(path, layer: int, keep: int, experts: bool = True, router: bool = True) -> None:
    """Cut a Mixtral layer to its first `keep` experts."""
    home = f"model.layers.{layer}.block_sparse_moe"

    def change(tensors):
        for name in list(tensors):
            found = re.match(rf"{re.escape(home)}\.experts\.(\d+)\.", name)
            if experts and found and int(found[1]) >= keep:
                del tensors[name]
        if router:
            tensors[f"{home}.gate.weight"] = tensors[f"{home}.gate.weight"][:keep]

    edit_tensors(path, change)


def drop_moe(path, layer: int) -> None:
    """Take a Mixtral layer's MoE out of the files."""
    drop(path, f"model.layers.{layer}.block_sparse_moe")


@pytest.fixture
def trimmed(good):
    """Mixtral without the MoE of layer 2 and with 5 of 8 experts in layer 1."""
    path = good()
    drop_moe(path, 2)
    keep_experts(path, 1, 5)
    set_config(path, per_layer_config={"1": {NUMBER: 5}, "2": {"skip": ["mlp"], NUMBER: 0}})
    return path


def test_trimmed_checkpoint_is_legal(trimmed):
    report = check_checkpoint(trimmed)
    assert report.findings == []
    assert report.experts == {0: 8, 1: 5, 2: 0, 3: 8}
    assert support.load(trimmed).config.num_hidden_layers == 4


def test_uniform_expert_drop_is_an_ordinary_checkpoint(good):
    path = good()
    for layer in range(4):
        keep_experts(path, layer, 5)
    assert errors(path) == {"config-experts"}
    assert "set the expert count to 5" in finding(path, "config-experts").way_out
    assert finding(path, "config-experts").subject == "layer 0-3"
    set_config(path, **{NUMBER: 5})
    assert check_checkpoint(path).findings == []


def test_experts_gone_but_router_uncut(good):
    path = good()
    keep_experts(path, 1, 5, router=False)
    found = finding(path, "experts-missing")
    assert errors(path) == {"experts-missing"}
    assert found.subject == "layer 1"


def test_router_cut_but_experts_there(good):
    path = good()
    keep_experts(path, 1, 5, experts=False)
    assert errors(path) == {"router-rows"}


def test_more_experts_than_stated(good):
    path = good()
    set_config(path, **{NUMBER: 6})
    assert errors(path) == {"config-experts"}


def test_an_expert_too_many(good):
    path = good()
    home = "model.layers.1.block_sparse_moe.experts"

    def change(tensors):
        for leaf in ("w1", "w2", "w3"):
            tensors[f"{home}.8.{leaf}.weight"] = tensors[f"{home}.7.{leaf}.weight"].clone()

    edit_tensors(path, change)
    assert errors(path) == {"experts-extra"}


def test_experts_that_were_not_renumbered(good):
    path = good()
    drop(path, "layers.1.block_sparse_moe.experts.3.")
    assert finding(path, "expert-gap").subject == "layer 1"
    assert errors(path) == {"expert-gap"}


def test_correction_bias_that_was_not_cut(good):
    path = good("deepseek_v3")
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    edit_tensors(path, lambda t: t.update({name: t[name][:6]}))
    assert errors(path) == {"router-rows"}


@pytest.mark.parametrize("model_type", ["granitemoe", "gpt_oss", "llama4_text"])
def test_fused_experts_are_counted(good, model_type):
    path = good(model_type)

    def change(tensors):
        for name, tensor in tensors.items():
            if "layers.1." in name and tensor.shape[:1] == (8,):
                tensors[name] = tensor[:5]

    edit_tensors(path, change)
    found = finding(path, "config-experts")
    assert errors(path) == {"config-experts"}
    assert found.subject == "layer 1"


def test_half_a_fused_cut(good):
    path = good("granitemoe")
    name = "model.layers.1.block_sparse_moe.router.layer.weight"
    edit_tensors(path, lambda t: t.update({name: t[name][:5]}))
    assert errors(path) == {"router-rows"}


def test_fewer_experts_than_top_k(good):
    path = good()
    for layer in range(4):
        keep_experts(path, layer, 1)
    set_config(path, **{NUMBER: 1})
    assert "experts-under-top-k" in errors(path)


@pytest.mark.parametrize(
    ("count", "fields", "code"),
    [
        (8, {"n_group": 3}, "groups-uneven"),
        (8, {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "groups-too-small"),
        (8, {"n_group": 8, "topk_group": 4}, "groups-too-small"),
        (8, {"n_group": 2, "topk_group": 3}, "groups-kept"),
    ],
)
def test_groups_that_cannot_be_routed(good, count, fields, code):
    path = good("deepseek_v3")
    assert codes(check_checkpoint(path)) == set()
    set_config(path, **fields)
    assert errors(path) == {code}


def test_skip_without_a_count_of_zero(trimmed):
    edit_json(trimmed / "config.json", lambda c: c["per_layer_config"]["2"].pop(NUMBER))
    assert "per-layer-skip-count" in errors(trimmed)


def test_count_of_zero_without_skip(trimmed):
    edit_json(trimmed / "config.json", lambda c: c["per_layer_config"]["2"].pop("skip"))
    assert errors(trimmed) == {"per-layer-count"}


def test_count_under_top_k_in_one_layer(trimmed):
    keep_experts(trimmed, 1, 1)
    edit_json(trimmed / "config.json", lambda c: c["per_layer_config"]["1"].update({NUMBER: 1}))
    report = check_checkpoint(trimmed)
    assert not report.ok
    assert "1" in report.errors[0].message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda layers: layers.update({"4": {"skip": ["mlp"], NUMBER: 0}}), "per-layer-index"),
        (lambda layers: layers.update({"-1": {NUMBER: 5}}), "per-layer-index"),
        (lambda layers: layers.update({"last": {NUMBER: 5}}), "per-layer-index"),
        (lambda layers: layers.update({"01": {NUMBER: 5}}), "per-layer-index"),
        (lambda layers: layers.update({"3": []}), "per-layer-malformed"),
        (lambda layers: layers["2"].update(skip="mlp"), "per-layer-malformed"),
        (lambda layers: layers["2"].update(skip=[1]), "per-layer-malformed"),
        (lambda layers: layers["2"].update(skip=["mlp", "attention"]), "per-layer-skip"),
        (
            lambda layers: [layers.setdefault(str(i), {}).update(foo=1) for i in range(4)],
            "per-layer-attribute",
        ),
        (lambda layers: layers.update({"3": {"foo": 5}}), "config-illegal"),
        (lambda layers: layers.update({"3": {"num_experts": 5}}), "per-layer-alias"),
        (lambda layers: layers["1"].update({NUMBER: -5}), "per-layer-count"),
        (lambda layers: layers["1"].update({NUMBER: "5"}), "config-illegal"),
        (lambda layers: layers["1"].update({NUMBER: True}), "config-illegal"),
    ],
)
def test_illegal_per_layer_config(trimmed, change, code):
    edit_json(trimmed / "config.json", lambda c: change(c["per_layer_config"]))
    assert code in errors(trimmed)


def test_per_layer_config_that_is_no_mapping(trimmed):
    set_config(trimmed, per_layer_config=[{}])
    assert errors(trimmed) == {"per-layer-malformed"}


def test_opt_out_is_never_written(trimmed):
    set_config(trimmed, allow_global_per_layer_attribute_access=True)
    assert errors(trimmed) == {"per-layer-opt-out"}


def test_per_layer_config_beside_the_text_config(good):
    path = good("qwen3_vl_moe")
    set_config(path, per_layer_config={"1": {"num_experts": 5}})
    assert "per-layer-place" in errors(path)


def test_tensors_left_of_a_dropped_moe(good):
    path = good()
    set_config(path, per_layer_config={"2": {"skip": ["mlp"], NUMBER: 0}})
    assert finding(path, "dropped-tensors-left").subject == "layer 2"
    assert errors(path) == {"dropped-tensors-left"}


def test_norm_of_a_dropped_moe_is_gone(trimmed):
    drop(trimmed, "model.layers.2.post_attention_layernorm")
    assert errors(trimmed) == {"dropped-norm-missing"}


def test_per_layer_count_that_is_not_what_is_stored(trimmed):
    edit_json(trimmed / "config.json", lambda c: c["per_layer_config"]["1"].update({NUMBER: 6}))
    assert finding(trimmed, "config-experts").subject == "layer 1"


def test_dense_layer_cannot_be_skipped(good):
    path = good("qwen2_moe")
    drop(path, "layers.0.mlp.shared", "layers.0.mlp.gate", "layers.0.mlp.experts")
    set_config(path, per_layer_config={"0": {"skip": ["mlp"], "num_experts": 0}}, mlp_only_layers=[0])
    assert not check_checkpoint(path).ok


def add_mtp(path, experts: int = 8, rows: int = 8) -> None:
    """Give a GLM-4-MoE or DeepSeek-V3 checkpoint the draft layer that its releases have at the end."""

    def change(tensors):
        for name, tensor in list(tensors.items()):
            if not name.startswith("model.layers.3."):
                continue
            new = name.replace("model.layers.3.", "model.layers.4.")
            found = re.search(r"experts\.(\d+)\.", name)
            if found and int(found[1]) >= experts:
                continue
            tensors[new] = (tensor[:rows] if ".mlp.gate." in name else tensor).clone()
        for part, shape in {
            "eh_proj": (64, 128),
            "enorm": (64,),
            "hnorm": (64,),
            "shared_head.norm": (64,),
        }.items():
            tensors[f"model.layers.4.{part}.weight"] = torch.zeros(shape)

    edit_tensors(path, change)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_mtp_layers(good, model_type):
    path = good(model_type)
    config = json.loads((path / "config.json").read_text())
    field = "num_nextn_predict_layers" if "num_nextn_predict_layers" in config else "num_mtp_layers"
    assert codes(check_checkpoint(path), "warning") == {"mtp-missing"}
    set_config(path, **{field: 0})
    assert check_checkpoint(path).findings == []
    add_mtp(path)
    assert errors(path) == {"mtp-unannounced"}
    set_config(path, **{field: 1})
    assert check_checkpoint(path).findings == []


def test_mtp_layer_that_was_not_pruned(good):
    path = good("deepseek_v3")
    add_mtp(path)
    for layer in (1, 2, 3):
        drop(path, *(f"layers.{layer}.mlp.experts.{e}." for e in (6, 7)))

    def change(tensors):
        for layer in (1, 2, 3):
            for leaf in ("weight", "e_score_correction_bias"):
                name = f"model.layers.{layer}.mlp.gate.{leaf}"
                tensors[name] = tensors[name][:6]

    edit_tensors(path, change)
    set_config(path, n_routed_experts=6)
    assert errors(path) == {"mtp-experts"}


def test_mtp_layer_whose_router_was_not_cut(good):
    path = good("deepseek_v3")
    add_mtp(path, rows=6)
    assert errors(path) == {"mtp-experts"}


def test_an_ordinary_block_behind_the_last_is_no_mtp_layer(good):
    path = good("deepseek_v3")
    set_config(path, num_hidden_layers=3)
    assert "config-layers" in errors(path)


def test_mtp_layer_left_at_its_old_index_after_a_block_drop(good):
    path = good("deepseek_v3")
    add_mtp(path)
    drop(path, "model.layers.3.")
    set_config(path, num_hidden_layers=3)
    assert "config-layers" in errors(path)


def test_tensor_parallel_heads_and_widths(good):
    path = good()  # 2 heads, 1 key-value head, 64 wide
    assert errors(path, tensor_parallel=2) == set()
    assert errors(path, tensor_parallel=4) == {"parallel-heads"}
    report = check_checkpoint(path, tensor_parallel=3)
    assert codes(report) == {"parallel-heads", "parallel-width", "parallel-vocab"}
    # with expert parallelism experts stay whole, attention is still split
    assert codes(check_checkpoint(path, tensor_parallel=3, expert_parallel=3)) >= {"parallel-heads"}


def test_key_value_heads_are_copied_but_not_torn(tmp_path):
    path = support.saved("mixtral", tmp_path, num_attention_heads=6, num_key_value_heads=3, head_dim=32)
    assert errors(path, tensor_parallel=3) == {
        "parallel-width",
        "parallel-vocab",
    }  # 64 wide experts, 128 words
    assert errors(path, tensor_parallel=2) == {"parallel-heads"}
    assert errors(path, tensor_parallel=6) == {"parallel-width", "parallel-vocab"}


@pytest.mark.parametrize("vocabulary", [130, 32_002])
def test_vocabularies_are_padded_before_they_are_shared_out(tmp_path, vocabulary):
    path = support.saved("mixtral", tmp_path, vocab_size=vocabulary, num_layers=2, num_attention_heads=4)
    report = check_checkpoint(path, tensor_parallel=4)
    assert report.ok
    padded = -(-vocabulary // 64) * 64
    assert f"to {padded}" in next(f.message for f in report.findings if f.code == "parallel-vocab")


def test_expert_parallel(trimmed):
    report = check_checkpoint(trimmed, expert_parallel=4)
    assert report.ok
    assert [f.subject for f in report.findings if f.code == "parallel-experts"] == ["layer 1"]
    assert finding(trimmed, "parallel-experts", expert_parallel=8).severity.value == "error"


@pytest.mark.parametrize("ranks", [{"tensor_parallel": 0}, {"expert_parallel": -1}])
def test_impossible_ranks(good, ranks):
    with pytest.raises(ValueError, match="at least 1"):
        check_checkpoint(good(), **ranks)
