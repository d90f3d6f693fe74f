"""config.json against tensor names and shapes: nothing missing, nothing extra, nothing of another size."""

import json
import re

import pytest
import support
import tiny_models
import torch
from breaking import WEIGHTS, codes, drop, edit_json, edit_tensors, errors, finding, rename, set_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmcompressor_moe.check import IllegalCheckpointError, check_checkpoint


@pytest.mark.parametrize("model_type", tiny_models.buildable())
def test_every_family_as_transformers_saves_it_is_legal_and_no_tensor_can_go(model_type, tmp_path):
    path = support.saved(model_type, tmp_path)
    report = check_checkpoint(path)
    # families announce MTP layers that transformers does not save
    assert codes(report) == set()
    assert codes(report, "warning") <= {"mtp-missing"}
    assert report.experts
    assert set(report.experts.values()) == {8}
    tensors = load_file(path / WEIGHTS)
    name = sorted(tensors)[len(tensors) // 3]
    save_file({k: v for k, v in tensors.items() if k != name}, path / WEIGHTS, {"format": "pt"})
    assert not check_checkpoint(path).ok, f"{name} is missing"
    wider = torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)
    save_file(tensors | {name: wider}, path / WEIGHTS, {"format": "pt"})
    assert not check_checkpoint(path).ok, f"{name} is too wide"
    save_file(tensors | {"model.layers.0.ghost.weight": torch.zeros(2)}, path / WEIGHTS, {"format": "pt"})
    assert not check_checkpoint(path).ok


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_judgement_agrees_with_what_transformers_reports_on_loading(good, data):
    path = good(data.draw(st.sampled_from(["mixtral", "qwen2_moe", "granitemoe"])))
    names = sorted(load_file(path / WEIGHTS))
    victim = data.draw(st.sampled_from(names))
    act = data.draw(st.sampled_from(["nothing", "drop", "rename", "shape", "copy"]))

    def change(tensors):
        if act == "drop":
            del tensors[victim]
        elif act == "rename":
            tensors[victim.replace("model", "modle").replace("lm_head", "head")] = tensors.pop(victim)
        elif act == "shape":
            tensors[victim] = tensors[victim][: max(1, len(tensors[victim]) // 2)]
        elif act == "copy":
            tensors[f"{victim}.copy"] = tensors[victim].clone()

    edit_tensors(path, change)
    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True
        )
        clean = not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    except Exception:
        clean = False
    assert check_checkpoint(path).ok == clean, (act, victim)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "null", '{"a": 1, "a": 2}', "[" * 100_000])
def test_unreadable_config(good, content):
    path = good()
    (path / "config.json").write_text(content)
    assert errors(path) == {"config-unreadable"}


def test_config_missing(good):
    path = good()
    (path / "config.json").unlink()
    assert errors(path) == {"config-missing"}


def test_unknown_architecture_and_remote_code_are_not_run(good):
    path = good()
    marker = path / "ran"
    (path / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    set_config(path, model_type="evil", auto_map={"AutoConfig": "modeling_evil.EvilConfig"})
    assert finding(path, "needs-remote-code").subject == "auto_map"
    set_config(path, model_type="mixtral")
    report = check_checkpoint(path)
    assert report.ok
    assert codes(report, "note") == {"remote-code"}
    assert not marker.exists()
    edit_json(path / "config.json", lambda c: c.pop("auto_map"))
    set_config(path, model_type="evil")
    assert errors(path) == {"config-illegal"}


def test_an_architecture_without_model_class(good):
    path = good()
    (path / "config.json").write_text(
        json.dumps({"model_type": "siglip_text_model", "architectures": ["No"]})
    )
    assert errors(path) == {"architecture-unknown"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_local_experts", 10**9),
        ("vocab_size", 2**63),
        ("hidden_size", -64),
        ("num_hidden_layers", -1),
    ],
)
def test_monstrous_numbers_end_the_check_not_the_machine(good, field, value):
    path = good()
    set_config(path, **{field: value})
    assert finding(path, "config-implausible").subject == field


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": "four"},
        {"hidden_size": None},
        {"num_local_experts": 2.5},
        {"hidden_act": "nothing"},
        {"architectures": 3, "hidden_size": []},
    ],
)
def test_nonsense_in_the_config_is_a_finding(good, values):
    path = good()
    set_config(path, **values)
    assert errors(path) & {"config-illegal", "config-unbuildable"}


def test_fewer_layers_stated_than_stored(good):
    path = good()
    set_config(path, num_hidden_layers=3)
    found = finding(path, "config-layers")
    assert errors(path) == {"config-layers"}
    assert "block 3" in found.message
    assert "set num_hidden_layers to 4" in found.way_out


def test_more_layers_stated_than_stored(good):
    # what llm-compressor 0.14 writes after a block was taken out
    path = good()
    drop(path, "model.layers.3.")
    found = finding(path, "config-layers")
    assert errors(path) == {"config-layers"}
    assert "set num_hidden_layers to 3" in found.way_out


def test_blocks_that_were_not_renumbered(good):
    path = good()
    drop(path, "model.layers.1.")
    assert "renumbered" in finding(path, "config-layers").way_out


def test_hidden_size_lies(good):
    path = good()
    set_config(path, hidden_size=128)
    assert finding(path, "config-hidden-size").way_out.startswith("set hidden_size to 64")


def test_vocab_size_lies(good):
    path = good()
    set_config(path, vocab_size=256)
    assert errors(path) == {"config-vocab-size"}


def test_intermediate_size_lies(good):
    path = good()
    set_config(path, intermediate_size=96)
    assert errors(path) == {"tensor-shape"}


def test_many_alike_are_one_finding(good):
    path = good()
    drop(path, "input_layernorm")
    report = check_checkpoint(path)
    assert len(report.errors) == 1
    assert "3 more like it" in report.errors[0].message


def test_tied_weights_may_be_absent_or_present(tmp_path):
    path = support.saved("mixtral", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(path / WEIGHTS)
    assert check_checkpoint(path).findings == []
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert check_checkpoint(path).findings == []
    drop(path, "lm_head")
    set_config(path, tie_word_embeddings=False)
    assert finding(path, "tensor-missing").subject == "lm_head.weight"


def test_weights_of_a_dtype_that_no_reader_takes(good):
    path = good()
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}))
    assert finding(path, "tensor-dtype").subject == "lm_head.weight"
    path = good()
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.bfloat16)}))
    assert check_checkpoint(path).ok


@pytest.mark.parametrize("length", [3, 5])
def test_per_layer_list_of_the_wrong_length(good, length):
    path = good("gpt_oss")
    edit_json(path / "config.json", lambda c: c.update(layer_types=(c["layer_types"] * 2)[:length]))
    assert finding(path, "config-list-length").subject == "layer_types"


def test_attention_in_an_order_that_vllm_does_not_run(good):
    path = good("gpt_oss")
    edit_json(
        path / "config.json", lambda c: c.update(layer_types=c["layer_types"][1:] + c["layer_types"][:1])
    )
    assert "modulo 2" in finding(path, "config-attention-order").message


def test_per_layer_list_that_only_the_config_class_knows(good):
    path = good("llama4_text")
    edit_json(path / "config.json", lambda c: c.update(no_rope_layers=c["no_rope_layers"] + [1]))
    assert finding(path, "config-list-length").subject == "no_rope_layers"


def test_list_of_layers_that_names_one_that_is_gone(good):
    path = good("qwen2_moe")
    set_config(path, mlp_only_layers=[4])
    assert "config-list-index" in errors(path)


def test_mixtral_under_llm_compressor_names(good):
    path = good()
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

    def change(name):
        for native, other in names.items():
            name = name.replace(f".{native}.weight", f".{other}.weight")
        return name

    rename(path, change)
    found = finding(path, "expert-names")
    assert errors(path) == {"expert-names"}
    assert "96 expert tensors" in found.message
    assert "gate_proj -> w1" in found.way_out
    rename(path, lambda name: name.replace("block_sparse_moe.experts", "mlp.experts"))
    assert errors(path) == {"expert-names"}


def test_fused_family_under_names_of_single_experts(good):
    path = good("qwen3_vl_moe")
    prefix = "model.language_model.layers.0.mlp.experts"

    def split(tensors):
        fused = tensors.pop(f"{prefix}.gate_up_proj")
        for index in range(8):
            gate, up = fused[index].T.chunk(2)
            tensors[f"{prefix}.{index}.gate_proj.weight"] = gate.contiguous()
            tensors[f"{prefix}.{index}.up_proj.weight"] = up.contiguous()

    edit_tensors(path, split)
    assert "fused" in finding(path, "expert-names").message


def test_a_text_model_keeps_the_prefix_of_the_checkpoint_it_came_from(good, tmp_path):
    path = good("qwen3_5_moe_text")
    rename(path, lambda name: re.sub(r"^model\.", "model.language_model.", name))
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "again")
    assert any(name.startswith("model.language_model.") for name in load_file(tmp_path / "again" / WEIGHTS))
    assert codes(check_checkpoint(tmp_path / "again")) == set()
    drop(tmp_path / "again", "layers.1.mlp.experts.3.down_proj")
    assert not check_checkpoint(tmp_path / "again").ok


def test_raise_if_errors_names_what_is_wrong(good):
    path = good()
    assert check_checkpoint(path).raise_if_errors().ok
    drop(path, "lm_head")
    with pytest.raises(IllegalCheckpointError, match=r"lm_head\.weight") as raised:
        check_checkpoint(path).raise_if_errors()
    assert raised.value.report.errors[0].code == "tensor-missing"


def test_a_dense_checkpoint_is_checked_too(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert check_checkpoint(tmp_path).ok
    drop(tmp_path, "layers.1.mlp.up_proj")
    assert errors(tmp_path) == {"tensor-missing"}


def test_config_is_not_changed_by_a_check(good):
    path = good()
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    check_checkpoint(path, tensor_parallel=2, expert_parallel=2)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before
    assert json.loads(before["config.json"])["model_type"] == "mixtral"
