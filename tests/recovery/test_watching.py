"""What is collected inside a model: against the model's own weights and against running its parts alone."""

from __future__ import annotations

from typing import Any

import pytest
import support
import tiny_models
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.profile.routers import router_logits
from llmcompressor_moe.recovery.lora import LoraSettings, add_lora
from llmcompressor_moe.recovery.watching import Watcher
from llmcompressor_moe.topology import find_topology

FAMILIES = ["mixtral", "qwen2_moe", "olmoe", "granitemoe", "deepseek_v3", "glm4_moe"]
BATCH = {"input_ids": support.token_ids(2, 9)}


def layers_of(model: PreTrainedModel) -> list[int]:
    return list(find_topology(model).moe_layers)


def everything(model: nn.Module, layers: list[int]) -> Watcher:
    return Watcher(model, routers=layers, expert_outputs=layers, hidden=range(4))


def decided(output: Any, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights of the experts that a router chose, from what it returned."""
    indices = next(value for value in output if not value.is_floating_point())
    shape = indices.shape
    return indices, next(
        v for v in output if v.is_floating_point() and v.shape == shape and shape[-1] < experts
    )


@pytest.mark.parametrize(
    "family", [*FAMILIES, "deepseek_v2", "deepseek_v4", "cohere2_moe", "gpt_oss", "laguna", "qwen3_moe"]
)
def test_probabilities_are_those_that_weigh_the_experts(family: str) -> None:
    model = tiny_models.build(family)
    topology, outputs = find_topology(model), {}
    for index, moe in topology.moe_layers.items():
        hook = lambda _m, _a, output, index=index: outputs.__setitem__(index, output)  # noqa: E731
        model.get_submodule(moe.router).register_forward_hook(hook)
    watcher = Watcher(model, routers=topology.moe_layers)
    with torch.no_grad(), watcher.watching() as seen:
        model(**BATCH)
    assert seen.router_logits.keys() == topology.moe_layers.keys()
    for index, logits in seen.router_logits.items():
        assert logits.shape == (18, 8) and logits.dtype == torch.float32
        indices, weights = decided(outputs[index], 8)
        ours = logits.softmax(-1).gather(-1, indices)
        # Families scale and renormalise; the share of each chosen expert is what they agree on.
        torch.testing.assert_close(
            ours / ours.sum(-1, keepdim=True), weights / weights.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4
        )


def test_probabilities_of_a_router_that_returns_them() -> None:
    model = tiny_models.build("gemma4_text", num_layers=2)
    captured = {}
    for index, moe in find_topology(model).moe_layers.items():
        hook = lambda _m, _a, output, index=index: captured.__setitem__(index, output[0])  # noqa: E731
        model.get_submodule(moe.router).register_forward_hook(hook)
    with torch.no_grad(), Watcher(model, routers=layers_of(model)).watching() as seen:
        model(**BATCH)
    for index, logits in seen.router_logits.items():
        torch.testing.assert_close(logits.softmax(-1), captured[index].reshape(18, 8))


@pytest.mark.parametrize("family", ["granitemoe", "mixtral"])
def test_a_router_that_chooses_all_its_experts(family: str) -> None:
    model = tiny_models.build(family, num_layers=1, num_experts=2, top_k=2)
    entered = []
    router = model.get_submodule(find_topology(model).moe_layers[0].router)
    router.register_forward_pre_hook(lambda _m, args: entered.append(args[0]))
    with torch.no_grad(), Watcher(model, routers=[0]).watching() as seen:
        model(**BATCH)
    weight = next(p for p in router.parameters() if p.ndim == 2)
    torch.testing.assert_close(seen.router_logits[0], entered[0].reshape(18, -1) @ weight.detach().T)


def test_scores_among_what_llama_4_returns() -> None:
    logits = torch.tensor([[-2.0, 3.0, 1.0]])
    masked = torch.tensor([[0.0, 0.95, 0.0]])
    assert router_logits((masked, logits), 3) is logits
    assert router_logits((logits, masked), 3) is logits
    assert router_logits((masked, masked + 1), 3) is masked


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_that_transformers_and_the_parts_alone_give(family: str) -> None:
    model = tiny_models.build(family)
    layers = layers_of(model)
    with torch.no_grad(), everything(model, layers).watching() as seen:
        output = model(**BATCH, output_hidden_states=True)
    for index in range(3):  # the last is reported behind the final norm
        torch.testing.assert_close(seen.hidden[index], output.hidden_states[index + 1])
    topology = find_topology(model)
    for index in layers:
        moe, entered = model.get_submodule(topology.moe_layers[index].module), []
        handle = moe.register_forward_pre_hook(lambda _m, args, kept=entered: kept.append(args[0].clone()))
        with torch.no_grad():
            model(**BATCH)
            handle.remove()
            torch.testing.assert_close(seen.expert_outputs[index], moe(entered[0]))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_linearized_experts_show_the_same(family: str) -> None:
    model = tiny_models.build(family)
    layers = layers_of(model)
    with torch.no_grad(), everything(model, layers).watching() as fused:
        model(**BATCH)
    model = linearize_moe(model)
    with torch.no_grad(), everything(model, layers).watching() as linear:
        model(**BATCH)
    for name in ("router_logits", "expert_outputs", "hidden"):
        for index, value in getattr(fused, name).items():
            torch.testing.assert_close(getattr(linear, name)[index], value, atol=1e-4, rtol=1e-4)


def backward(model: nn.Module, layers: list[int]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with everything(model, layers).watching() as seen:
        model(**BATCH)
    parts = [*seen.router_logits.values(), *seen.expert_outputs.values(), *seen.hidden.values()]
    sum(part.square().mean() for part in parts).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_under_checkpointing_are_those_without(family: str) -> None:
    model = tiny_models.build(family).train()
    layers = layers_of(model)
    plain = backward(model, layers)
    runs = []
    model.get_submodule(find_topology(model).blocks[1].name).register_forward_pre_hook(
        lambda *_: runs.append(None)
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = backward(model, layers)
    assert len(runs) == 2, "the block did not run again, so nothing was checkpointed"
    assert again.keys() == plain.keys()
    routers = {find_topology(model).moe_layers[index].router for index in layers}
    assert all(any(name.startswith(router) for name in plain) for router in routers)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


@pytest.mark.parametrize("targets", [("router",), ("experts",), ("attention", "experts", "router")])
def test_a_student_with_adapters(targets: tuple[str, ...]) -> None:
    model = tiny_models.build("qwen2_moe")
    layers = layers_of(model)
    with torch.no_grad(), everything(model, layers).watching() as plain:
        model(**BATCH)
    adapted = add_lora(model, LoraSettings(rank=2, targets=targets))
    with everything(adapted, layers).watching() as seen:
        adapted(**BATCH)
    # New adapters change nothing.
    for name in ("router_logits", "expert_outputs", "hidden"):
        for index, value in getattr(plain, name).items():
            torch.testing.assert_close(getattr(seen, name)[index].detach(), value)
    sum(value.square().mean() for value in seen.router_logits.values()).backward()
    reached = {
        name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert reached and all("lora_" in name for name in reached)
    if "router" in targets:
        assert any(".gate." in name for name in reached)


def test_hooks_are_gone_afterwards_and_nothing_else_is_touched() -> None:
    model = tiny_models.build("mixtral", num_layers=2)
    before = support.logits(model)
    watcher = Watcher(model, routers=[0, 1], expert_outputs=[1], hidden=[0])
    with pytest.raises(RuntimeError, match="stop"), watcher.watching():
        raise RuntimeError("stop")
    with torch.no_grad(), watcher.watching() as first:
        model(**BATCH)
        model(input_ids=BATCH["input_ids"].flip(0))
    with torch.no_grad(), watcher.watching() as second:
        model(input_ids=BATCH["input_ids"].flip(0))
    # The last forward is kept.
    torch.testing.assert_close(first.router_logits[1], second.router_logits[1])
    assert first.expert_outputs.keys() == {1} and first.hidden.keys() == {0}
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(support.logits(model), before)


def test_what_cannot_be_watched() -> None:
    dense_first = tiny_models.build("deepseek_v3", num_layers=2)
    with pytest.raises(ValueError, match="Block 0 has no MoE layer"):
        Watcher(dense_first, routers=[0])
    with pytest.raises(ValueError, match=r"has 2 blocks; there is no block \[5\]"):
        Watcher(dense_first, hidden=[0, 5])
    one_more = tiny_models.build("zaya", num_layers=2)
    watcher = Watcher(one_more, routers=layers_of(one_more))
    with pytest.raises(ValueError, match="does not tell how it scores its 8 experts"), watcher.watching():
        one_more(**BATCH)
    model = tiny_models.build("mixtral", num_layers=2).train()
    watcher = Watcher(model, hidden=[0])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"), watcher.watching():
        model(**BATCH)
    model.eval()
    with (
        pytest.raises(ValueError, match=r"Of blocks \[0\] the hidden part .* did not run"),
        watcher.watching(),
    ):
        pass
