"""Whether a router's scores are a softmax, of every family, against what its weights follow from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.profile.routers import OTHER, SIGMOID, SOFTMAX, RouterReader, are_probabilities
from llmcompressor_moe.recovery.scores import RouterScores
from llmcompressor_moe.topology import find_topology

FUNCTIONS = {
    SOFTMAX: lambda logits: logits.softmax(-1),
    SIGMOID: torch.sigmoid,
    OTHER: lambda logits: nn.functional.softplus(logits).sqrt(),
}
# Its one output is its logits: the block around it takes the softmax.
LOGITS_ONLY = {"jamba": SOFTMAX}
# SparseMixer: a softmax over the experts within reach of the best.
MASKED = {"phimoe": SOFTMAX}
# Its last class is no expert, so its scores are not read.
WITHOUT_SCORES = {"zaya"}


def routed(model: PreTrainedModel) -> dict[int, Any]:
    """Block index -> what the router returned."""
    found: dict[int, Any] = {}
    handles = [
        model.get_submodule(moe.router).register_forward_hook(
            lambda _m, _a, output, index=index: found.__setitem__(index, output)
        )
        for index, moe in find_topology(model).moe_layers.items()
    ]
    ids = torch.randint(3, tiny_models.VOCAB - 8, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def brute_force(output: Any, experts: int) -> set[str]:
    """The functions of the logits that the chosen experts' weights are in proportion to, token by token."""
    output = [output] if isinstance(output, torch.Tensor) else [v for v in output if torch.is_tensor(v)]
    scores = [v for v in output if v.is_floating_point() and v.shape[-1] == experts]
    found = set()
    for logits in [v for v in scores if (v < 0).any()] or scores:
        rest = [v for v in output if v is not logits]
        index = next((v for v in rest if not v.is_floating_point()), None)
        for weights in (v for v in rest if v.is_floating_point()):
            if index is None and weights.shape == logits.shape:
                chosen = weights > 0
                assert (chosen.sum(-1) == 1).all(), "only Llama 4 is known to return all weights"
                index = chosen.int().argmax(-1, keepdim=True)
                weights = weights.gather(-1, index)
            if index is None or weights.shape != index.shape:
                continue
            for name, function in FUNCTIONS.items():
                theirs, ours = function(logits.double()).gather(-1, index), weights.double()
                if index.shape[-1] > 1:
                    theirs, ours = (v / v.sum(-1, keepdim=True) for v in (theirs, ours))
                if torch.allclose(theirs, ours, rtol=1e-4, atol=1e-6):
                    found.add(name)
    return found


@pytest.mark.parametrize("family", tiny_models.buildable())
def test_scoring_is_what_the_weights_follow_from(family: str) -> None:
    model = tiny_models.build(family, num_layers=3)
    exact = routed(model)
    rounded = routed(model.bfloat16())
    assert exact and exact.keys() == rounded.keys() == find_topology(model).moe_layers.keys()
    for index, output in [*exact.items(), *rounded.items()]:
        moe = find_topology(model).moe_layers[index]
        router = model.get_submodule(moe.router)
        reader = RouterReader(router, moe.num_experts, model.config)
        if family in WITHOUT_SCORES:
            assert reader.probabilities(output) is None and reader.logits(output) is None
            continue
        if family == "gemma4_text":
            expected = {SOFTMAX}
            assert are_probabilities(exact[index][0])
        else:
            expected = brute_force(exact[index], moe.num_experts)
        if family in LOGITS_ONLY | MASKED:
            assert not expected, "the table of this test names a family that tells by itself"
            expected = {(LOGITS_ONLY | MASKED)[family]}
        assert {reader.scoring(output)} == expected
        probabilities = reader.probabilities(output)
        assert (probabilities is not None) == (expected == {SOFTMAX})
        if probabilities is not None:
            torch.testing.assert_close(
                probabilities,
                RouterScores(router, moe.num_experts, "", model.config).read(output).softmax(-1),
            )


@pytest.mark.parametrize("experts", [8, 64, 256])
def test_a_softmax_in_bfloat16_is_one(experts: int) -> None:
    logits = 2 * torch.randn(500, experts, generator=torch.Generator().manual_seed(experts))
    rounded = logits.bfloat16().softmax(-1)
    assert (rounded.float().sum(-1) - 1).abs().max() > 1e-3
    assert are_probabilities(rounded)
    reader = RouterReader(nn.Identity(), experts)
    torch.testing.assert_close(reader.probabilities(rounded), rounded.float())
    assert not are_probabilities(logits) and not are_probabilities(logits.sigmoid())
    assert not are_probabilities(rounded.float() * 1.01)


@pytest.mark.parametrize(("name", "expected"), [("softmax", SOFTMAX), ("sigmoid", SIGMOID), ("tanh", OTHER)])
@pytest.mark.parametrize("field", ["scoring_func", "expert_selection_fn", "moe_router_activation_func"])
def test_a_name_decides_where_outputs_do_not(field: str, name: str, expected: str) -> None:
    router, logits = nn.Identity(), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    setattr(router, field, name)
    assert RouterReader(router, 8).scoring(logits) == expected
    # Outputs that tell are believed before a name that the class may not read.
    weights, index = logits.softmax(-1).topk(3)
    assert RouterReader(router, 8).scoring((logits, weights, index)) == SOFTMAX


@pytest.mark.parametrize("selection", [SOFTMAX, SIGMOID])
@pytest.mark.parametrize("family", ["cohere2_moe"])
def test_a_family_with_both(family: str, selection: str) -> None:
    model = tiny_models.build(family, expert_selection_fn=selection)
    for index, output in routed(model).items():
        moe = find_topology(model).moe_layers[index]
        reader = RouterReader(model.get_submodule(moe.router), moe.num_experts, model.config)
        assert reader.scoring(output) == selection
        assert brute_force(output, moe.num_experts) == {selection}


def test_an_output_that_tells_nothing_leaves_the_question_open() -> None:
    reader = RouterReader(nn.Identity(), 4)
    alike = torch.zeros(3, 4)
    assert reader.scoring((alike, torch.full((3, 2), 0.5), torch.tensor([[0, 1]] * 3))) == SOFTMAX
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    weights, index = logits.sigmoid().topk(2)
    assert reader.scoring((logits, weights / weights.sum(-1, keepdim=True), index)) == SIGMOID
    assert reader.scoring((alike, torch.full((3, 2), 0.5), torch.tensor([[0, 1]] * 3))) == SIGMOID


def test_adapters_hide_no_name() -> None:
    inner = nn.Identity()
    inner.scoring_func = "sigmoid"
    wrapper = nn.Module()
    wrapper.base_layer = inner
    assert RouterReader(wrapper, 4).scoring(torch.randn(3, 4)) == SIGMOID


def test_unknown_functions_are_refused_where_a_distribution_is_needed() -> None:
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    weights, index = logits.square().topk(2)
    scores = RouterScores(nn.Identity(), 4, "block 3")
    with pytest.raises(ValueError, match="block 3 does not tell"):
        scores.read((logits, weights, index))
    held = SimpleNamespace(score_fn=torch.square)
    torch.testing.assert_close(
        RouterScores(held, 4, "block 3").read((logits, weights, index)).exp(), logits.square()
    )
