"""Gradients reach exactly the parameters that were named."""

from __future__ import annotations

import pytest
import recovery_cases as cases
import support
import tiny_models
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe

from llmcompressor_moe.recovery.lora import LoraSettings, add_lora
from llmcompressor_moe.recovery.parameters import PARAMETER_SETS, check_sets, select

# What a set is, written by hand: family -> set -> endings of the parameters' names.
EXPECTED = {
    "mixtral": {
        "router": ("mlp.gate.weight",),
        "norms": ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"),
        "experts": ("experts.gate_up_proj", "experts.down_proj"),
        "attention": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
    },
    "qwen2_moe": {
        "router": ("mlp.gate.weight", "mlp.shared_expert_gate.weight"),
        "experts": (
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
            "shared_expert.gate_proj.weight",
            "shared_expert.up_proj.weight",
            "shared_expert.down_proj.weight",
        ),
    },
    "qwen3_moe": {
        "norms": ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight"),
        "attention": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
    },
    # Its first block is dense, and its router and experts stand in the block itself in Gemma 4.
    "deepseek_v3": {
        "router": ("1.mlp.gate.weight",),
        "experts": (
            "1.mlp.experts.gate_up_proj",
            "1.mlp.experts.down_proj",
            "shared_experts.gate_proj.weight",
            "shared_experts.up_proj.weight",
            "shared_experts.down_proj.weight",
        ),
    },
    "gemma4_text": {
        "router": ("router.scale", "router.per_expert_scale", "router.proj.weight"),
        "experts": ("experts.gate_up_proj", "experts.down_proj"),
    },
}
CASES = [(family, name) for family, sets in EXPECTED.items() for name in sets]


def reached(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that have a gradient after a backward pass."""
    ids = support.token_ids(4)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {
        name for name, value in model.named_parameters() if value.grad is not None and value.grad.abs().sum()
    }


@pytest.mark.parametrize(("family", "name"), CASES)
def test_gradients_reach_exactly_a_set(family, name):
    model = tiny_models.build(family, num_layers=2)
    selected = select(model, [name])
    expected = {path for path, _ in model.named_parameters() if path.endswith(EXPECTED[family][name])}
    assert expected == set(selected) == reached(model)


def test_sets_add_up_and_replace_what_trained_before():
    model = tiny_models.build("mixtral", num_layers=2)
    select(model, ["all"])
    both = select(model, ["router", "attention"])
    assert set(both) == reached(model) == {*select(model, ["router"]), *select(model, ["attention"])}


def test_all_is_every_parameter():
    model = tiny_models.build("mixtral", num_layers=2)
    assert set(select(model, ["all"])) == reached(model) == {name for name, _ in model.named_parameters()}


def test_linearized_experts_are_experts():
    model = tiny_models.build("mixtral", num_layers=2, num_experts=4)
    linearize_moe(model)
    selected = select(model, ["experts"])
    assert len(selected) == 2 * 4 * 3
    assert set(selected) == reached(model)


def test_adapters_are_a_set_of_their_own_beside_others():
    model = add_lora(tiny_models.build("mixtral", num_layers=2), LoraSettings(rank=4, targets=("experts",)))
    adapters = select(model, ["lora"])
    assert adapters and all("lora_" in name for name in adapters)
    # B is zero at first, so A has no gradient yet.
    assert reached(model) == {name for name in adapters if "lora_B" in name}
    model.zero_grad()
    selected = select(model, ["lora", "router"])
    routers = {name for name in selected if name not in adapters}
    assert {name.rpartition("layers.")[2] for name in routers} == {"0.mlp.gate.weight", "1.mlp.gate.weight"}
    assert reached(model) == routers | {name for name in adapters if "lora_B" in name}


def test_weights_under_adapters_keep_their_sets():
    plain = tiny_models.build("qwen2_moe", num_layers=2)
    expected = {name: len(select(plain, [name])) for name in ("router", "norms", "experts", "attention")}
    wrapped = add_lora(plain, LoraSettings(rank=4, targets=("attention", "experts", "router")))
    assert {name: len(select(wrapped, [name])) for name in expected} == expected


def test_a_dense_student_has_attention_and_norms_and_no_experts():
    model = cases.dense()
    selected = select(model, ["attention", "norms"])
    assert set(selected) == reached(model)
    assert {name.split(".")[-2] for name in selected} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("input_layernorm", "post_attention_layernorm", "norm"),
    }
    with pytest.raises(ValueError, match="train='router': MistralForCausalLM has no such parameters"):
        select(model, ["router"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["routers"], "train='routers': choose some of router, norms"),
        ([], "train names no parameters"),
    ],
)
def test_unknown_sets_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        check_sets(names)


def test_adapters_have_to_be_there():
    with pytest.raises(
        ValueError, match="train='lora': MixtralForCausalLM has no such parameters; add adapters"
    ):
        select(tiny_models.build("mixtral", num_layers=2), ["lora"])


def test_every_name_is_known_once():
    assert check_sets(["router", "router", "norms"]) == ("router", "norms")
    assert check_sets(PARAMETER_SETS) == PARAMETER_SETS
