"""The default sensitivity against a recomputation with hooks and by hand; the rule for starved experts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import support
import tiny_models
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.profile.options import run_options
from llmcompressor_moe.profile.samples import collect_samples
from llmcompressor_moe.quantization.measure import LayerMeasurement, measure_candidates
from llmcompressor_moe.quantization.schemes import Candidate, resolve_schemes
from llmcompressor_moe.quantization.sensitivity import (
    PRIOR_TOKENS,
    SENSITIVITIES,
    SensitivityInput,
    output_error,
    sensitivity,
    starved,
)
from llmcompressor_moe.topology import expert_modules, find_topology

GROUP = 32


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric integers in groups along the inputs, written from the definition."""
    groups = weight.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    integers = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (integers * scale).flatten(-2)


def measured(model: PreTrainedModel, candidates: list[Candidate], batches, tokens: int = 10_000):
    linear = linearize_moe(copy.deepcopy(model))
    topology = find_topology(linear)
    samples = collect_samples(linear, topology, batches, tokens)
    experts = {
        layer: expert_modules(linear.get_submodule(moe.experts)) for layer, moe in topology.moe_layers.items()
    }
    return measure_candidates(experts, samples, candidates)


def batches_of(ids: torch.Tensor, padded: int = 0) -> list[dict[str, torch.Tensor]]:
    batches = []
    for row in ids:
        mask = torch.ones(1, len(row), dtype=torch.long)
        mask[:, len(row) - padded :] = 0
        batches.append({"input_ids": row[None], "attention_mask": mask})
    return batches


def by_hand(model: PreTrainedModel, batches, bits: int) -> dict[int, torch.Tensor]:
    """Sum per expert of ||g (f(x) - f_q(x))||^2, from the stock model's fused experts."""
    found: dict[int, torch.Tensor] = {}
    keep: list[torch.Tensor] = []
    handles = []

    def hook(layer: int, experts: nn.Module):
        def compare(_module, args):
            hidden, index, weights = args
            hidden = hidden.reshape(-1, hidden.shape[-1])
            sums = found.setdefault(layer, torch.zeros(len(experts.gate_up_proj), dtype=torch.float64))
            for token in keep[-1].nonzero().flatten().tolist():
                for expert, gate in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                    outputs = []
                    for change in (lambda w: w, lambda w: rounded(w, bits)):
                        gate_weight, up_weight = experts.gate_up_proj[expert].chunk(2)
                        inner = nn.functional.silu(hidden[token] @ change(gate_weight).T)
                        inner = inner * (hidden[token] @ change(up_weight).T)
                        outputs.append(inner @ change(experts.down_proj[expert]).T)
                    sums[expert] += (gate * (outputs[0] - outputs[1])).double().square().sum()

        return experts.register_forward_pre_hook(compare)

    for layer, moe in find_topology(model).moe_layers.items():
        handles.append(hook(layer, model.get_submodule(moe.experts)))
    with torch.no_grad():
        for batch in batches:
            keep.append(batch["attention_mask"].flatten().bool())
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "olmoe"])
def test_measured_error_equals_a_recomputation(model_type: str) -> None:
    model = tiny_models.build(model_type)
    batches = batches_of(support.token_ids(4, 12), padded=3)
    candidates = resolve_schemes(["W4A16", "W8A16", "UNQUANTIZED"], GROUP, "schemes")
    found = measured(model, candidates, batches)
    for bits in (4, 8):
        for layer, expected in by_hand(model, batches, bits).items():
            ours = torch.tensor(found[layer].sampled_error[f"W{bits}A16"], dtype=torch.float64)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-9)
    assert all(m.sampled_weight == pytest.approx(m.squared_weight) for m in found.values())
    assert all(m.tokens == 4 * 9 for m in found.values())


def test_weight_error_is_what_rounding_changes() -> None:
    model = tiny_models.build("mixtral")
    found = measured(model, resolve_schemes(["W4A16"], GROUP, "schemes"), batches_of(support.token_ids(2, 8)))
    experts = model.model.layers[1].mlp.experts
    expected = [
        sum(
            float((w - rounded(w, 4)).detach().square().sum())
            for w in (*experts.gate_up_proj[e].chunk(2), experts.down_proj[e])
        )
        for e in range(8)
    ]
    assert found[1].weight_error["W4A16"] == pytest.approx(expected, rel=1e-4)


def test_a_sample_estimates_the_whole() -> None:
    model = tiny_models.build("mixtral")
    batches = batches_of(support.token_ids(16, 64))
    candidates = resolve_schemes(["W4A16"], GROUP, "schemes")
    whole, part = measured(model, candidates, batches), measured(model, candidates, batches, tokens=64)
    for layer in whole:
        assert whole[layer].routed_tokens == part[layer].routed_tokens
        few = [m.sampled_weight for m in (part[layer], whole[layer])]
        assert sum(few[0]) < 0.5 * sum(few[1])
        sums = [
            sum(output_error(SensitivityInput(m, {}, layer, 0))["W4A16"]) for m in (whole[layer], part[layer])
        ]
        assert sums[1] == pytest.approx(sums[0], rel=0.1)


@pytest.mark.parametrize(
    "scheme", ["W8A8", "FP8_DYNAMIC", "FP8", "NVFP4", "NVFP4A16", "MXFP4", "MXFP8A16", "W4AFP8"]
)
def test_every_kind_of_preset_can_be_tried(scheme: str) -> None:
    model = tiny_models.build("mixtral")
    candidates = resolve_schemes([scheme], GROUP, "schemes")
    found = measured(model, candidates, batches_of(support.token_ids(4, 12)))
    for layer in found.values():
        errors = layer.sampled_error[scheme]
        power = layer.output_power * layer.tokens
        assert all(error >= 0 for error in errors)
        assert 0 < sum(errors) < 0.5 * power


def test_quantized_inputs_cost_more_than_quantized_weights_alone() -> None:
    model = tiny_models.build("mixtral")
    weights = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    alone = Candidate("weights", QuantizationScheme(targets=[], weights=weights))
    both = resolve_schemes(["W8A8"], None, "schemes")[0]
    found = measured(model, [alone, both], batches_of(support.token_ids(4, 12)))
    for layer in found.values():
        assert sum(layer.sampled_error["W8A8"]) > 1.2 * sum(layer.sampled_error["weights"])


# The rule for experts that see few tokens


def layer(
    tokens: list[int], error_per_token: list[float], changes: list[float] | None = None
) -> LayerMeasurement:
    squared = [0.25 * count for count in tokens]
    return LayerMeasurement(
        tokens=1000,
        routed_tokens=tokens,
        squared_weight=squared,
        sampled_weight=squared,
        sampled_error={"s": [count * error for count, error in zip(tokens, error_per_token, strict=True)]},
        weight_error={"s": changes or [1.0] * len(tokens)},
        output_power=1.0,
    )


def errors_of(measurement: LayerMeasurement) -> list[float]:
    return output_error(SensitivityInput(measurement, {}, 0, 0))["s"]


def test_an_unseen_expert_is_not_taken_for_a_tolerant_one() -> None:
    unseen, tolerant, average = errors_of(layer([0, 1000, 1000], [0.0, 1e-6, 1.0]))
    assert unseen == pytest.approx(PRIOR_TOKENS * 0.5 / 1000, rel=1e-2)
    assert tolerant < average
    # Its own error is nothing against what every expert gets on top; without evidence it is never below that.
    assert unseen == pytest.approx(tolerant, rel=0.01)
    assert starved(layer([0, 15, 16], [0, 0, 0])) == [0, 1]


def test_an_unseen_expert_whose_weights_suffer_more_counts_more() -> None:
    gentle, rough, _ = errors_of(layer([0, 0, 1000], [0, 0, 1.0], changes=[0.5, 1.5, 1.0]))
    assert rough == pytest.approx(3 * gentle)


def test_with_many_tokens_the_rule_makes_no_difference() -> None:
    ours = errors_of(layer([100_000, 300_000], [1.0, 2.0]))
    assert ours == pytest.approx([100.0, 600.0], rel=1e-3)


def test_the_others_by_definition() -> None:
    measurement = layer([10, 30], [1.0, 1.0], changes=[3.0, 4.0])
    given = SensitivityInput(measurement, {"s": 2.0}, 0, 7)
    assert SENSITIVITIES["frequency"].errors(given)["s"] == pytest.approx([0.25 / 16, 0.75 / 16])
    assert SENSITIVITIES["uniform"].errors(given)["s"] == [1 / 16, 1 / 16]
    assert SENSITIVITIES["weight_error"].errors(given)["s"] == [3.0, 4.0]
    random = SENSITIVITIES["random"].errors
    assert random(given) == random(given)
    assert random(given) != random(SensitivityInput(measurement, {"s": 2.0}, 0, 8))
    with pytest.raises(ValueError, match=r"sensitivity='hessian' is unknown; there are output_error"):
        sensitivity("hessian")


def test_offloaded_experts_are_measured_alike(tmp_path: Path) -> None:
    from compressed_tensors.offload import offload_model

    model = linearize_moe(support.load(support.saved("mixtral", tmp_path)))
    batches = batches_of(support.token_ids(4, 12))
    candidates = resolve_schemes(["W4A16"], GROUP, "schemes")

    def run():
        topology = find_topology(model)
        samples = collect_samples(model, topology, batches, 1000)
        experts = {i: expert_modules(model.get_submodule(m.experts)) for i, m in topology.moe_layers.items()}
        return measure_candidates(experts, samples, candidates)

    plain = run()
    offload_model(model, torch.device("cpu"), torch.device("cpu"))
    offloaded = run()
    for index in plain:
        assert offloaded[index].sampled_error["W4A16"] == pytest.approx(
            plain[index].sampled_error["W4A16"], rel=1e-5
        )


def test_experts_in_16_bit_are_rounded_in_16_bit_and_measured_in_32(tmp_path: Path) -> None:
    model = support.load(support.saved("mixtral", tmp_path)).to(torch.bfloat16)
    whole = copy.deepcopy(model).float()
    batches, candidates = batches_of(support.token_ids(4, 12)), resolve_schemes(["W4A16"], GROUP, "schemes")
    with run_options(compute_dtype=torch.float32):
        half = measured(linearize_moe(model).to(torch.bfloat16), candidates, batches)
    full = measured(linearize_moe(whole), candidates, batches)
    for index, ours in half.items():
        # Scales and rounded weights are stored in 16 bit: that is part of the scheme, and moves single experts.
        assert sum(ours.sampled_error["W4A16"]) == pytest.approx(
            sum(full[index].sampled_error["W4A16"]), rel=0.1
        )
        assert ours.routed_tokens == full[index].routed_tokens
