"""Adapters change nothing at first, learn, and are gone after they were merged."""

from __future__ import annotations

import itertools

import pytest
import support
import tiny_models
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.recovery.lora import LoraSettings, add_lora, merge_lora
from llmcompressor_moe.recovery.parameters import select
from llmcompressor_moe.recovery.students import load_student, save_student

TARGETS = ("attention", "experts", "router")
# Fused experts in both orientations and with biases, shared experts, and every kind of router.
FAMILIES = (
    "mixtral",
    "gpt_oss",
    "qwen2_moe",
    "deepseek_v3",
    "llama4_text",
    "phimoe",
    "ernie4_5_moe",
    "gemma4_text",
)


def trained(model: torch.nn.Module, steps: int = 6) -> list[float]:
    """Losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=5e-4)
    ids = support.token_ids(4)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_answer_as_they_did_beside_the_weights(family, target):
    model = tiny_models.build(family, num_layers=2)
    names, before = sorted(name for name, _ in model.named_parameters()), support.logits(model)
    frozen = {name: value.clone() for name, value in model.named_parameters()}
    torch.manual_seed(0)
    adapted = add_lora(model, LoraSettings(rank=4, alpha=8, targets=(target,)))
    torch.testing.assert_close(support.logits(adapted), before, atol=1e-4, rtol=1e-4)
    select(adapted, ["lora"])
    losses = trained(adapted)
    # Where another expert is chosen the loss jumps, whichever way; every other step is one downhill.
    assert sum(after < before for before, after in itertools.pairwise(losses)) >= len(losses) - 2
    answers = support.logits(adapted)
    assert (answers - before).abs().max() > 1e-3
    merged = merge_lora(adapted)
    torch.testing.assert_close(support.logits(merged), answers, atol=1e-4, rtol=1e-4)
    assert sorted(name for name, _ in merged.named_parameters()) == names
    changed = {name for name, value in merged.named_parameters() if not torch.equal(value, frozen[name])}
    # An adapter changes matrices of its part alone, and all of them.
    part = {
        name
        for name in select(merged, [target])
        if merged.get_parameter(name).ndim > 1 and "bias" not in name
    }
    assert changed == part


def test_every_expert_gets_an_update_of_the_rank_asked_for():
    model = tiny_models.build("mixtral", num_layers=2)
    before = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    adapted = add_lora(model, LoraSettings(rank=4, targets=("experts",)))
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value)
    update = merge_lora(adapted).model.layers[0].mlp.experts.gate_up_proj.detach() - before
    assert torch.linalg.matrix_rank(update, rtol=1e-4).tolist() == [4] * 8


def test_linearized_experts_take_adapters_one_by_one():
    model = tiny_models.build("mixtral", num_layers=2, num_experts=4)
    linearize_moe(model)
    adapted = add_lora(model, LoraSettings(rank=4, targets=("experts",)))
    assert len(select(adapted, ["lora"])) == 2 * 4 * 3 * 2
    trained(adapted)
    answers = support.logits(adapted)
    torch.testing.assert_close(support.logits(merge_lora(adapted)), answers, atol=1e-4, rtol=1e-4)


def test_what_was_merged_is_a_stock_checkpoint(tmp_path):
    source = support.saved("mixtral", tmp_path, num_layers=2)
    student = add_lora(load_student(source), LoraSettings(rank=4, targets=TARGETS))
    select(student, ["lora"])
    trained(student)
    student.eval()
    answers = support.logits(student)
    assert save_student(merge_lora(student), tmp_path / "out", source).ok
    assert check_checkpoint(tmp_path / "out").ok
    stock, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    torch.testing.assert_close(support.logits(stock.eval()), answers, atol=1e-4, rtol=1e-4)
    assert not list((tmp_path / "out").glob("adapter*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"targets": ()}, "name at least one of attention, experts, router"),
        ({"targets": ("mlp",)}, "targets"),
        ({"dropout": 0.1, "targets": ("attention", "experts")}, "dropout=0.1 with targets=experts"),
        ({"ranks": 4}, "ranks"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        LoraSettings(**settings)


def test_parts_that_are_not_there_are_refused():
    # Its first blocks have no attention but state-space layers, whose kernels read weights past any adapter.
    model = tiny_models.build("nemotron_h", num_layers=2)
    with pytest.raises(
        ValueError, match="lora targets='attention': NemotronHForCausalLM has no such weights"
    ):
        add_lora(model, LoraSettings())
