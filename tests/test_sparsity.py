"""ExpertSparsityModifier against upstream's own SparseGPT and Wanda, brute force, scipy, and counted zeros."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import tiny_models
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from safetensors.torch import load_file
from scipy.optimize import minimize
from transformers import PreTrainedModel

from llmcompressor_moe import (
    BlockDropModifier,
    ExpertDropModifier,
    ExpertSparsityModifier,
    LayerDropModifier,
    RouterAwareQuantModifier,
)
from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.profile import Profile
from llmcompressor_moe.profile.data import ExpertProfile
from llmcompressor_moe.report import PlanFileError
from llmcompressor_moe.sparsity.importance import importance_of
from llmcompressor_moe.sparsity.ratios import STEEPNESS, experts_to_prune, ratios_for_mean

EXPERTS = r"re:.*experts\.\d+\.(gate|up|down)_proj$"
UPSTREAM = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
# SparseGPT's sums depend on the order of the samples in their last bits.
IN_ORDER = {"shuffle_calibration_samples": False}


def w4a16() -> dict[str, QuantizationScheme]:
    weights = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    return {"experts": QuantizationScheme(targets=[EXPERTS], weights=weights)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def pruned(path: Path, folder: Path, *, options: dict[str, Any] | None = None, **fields: Any):
    """The model and its report."""
    report = folder / "report.json"
    modifier = ExpertSparsityModifier(report_path=str(report), **fields)
    model = support.trim(support.load(path), modifier, **IN_ORDER, **(options or {}))
    return model, json.loads(report.read_text())


def expert_weights(model: PreTrainedModel, layer: int, expert: int) -> torch.Tensor:
    """All weights of an expert in one row, fused experts or linearized ones."""
    experts = model.model.layers[layer].mlp.experts
    if hasattr(experts, "gate_up_proj"):
        parts = [experts.gate_up_proj[expert], experts.down_proj[expert]]
    else:
        one = experts[expert]
        parts = [one.gate_proj.weight, one.up_proj.weight, one.down_proj.weight]
    return torch.cat([part.detach().flatten() for part in parts])


# The ratios

experts = st.lists(
    st.tuples(st.floats(0, 1e6), st.integers(1, 5).map(lambda n: 64 * n)), min_size=1, max_size=40
)


@given(experts, st.floats(0.02, 0.98), st.floats(0, 1), st.floats(0, 1))
def test_ratios_keep_mean_bounds_and_order(given_experts, mean, below, above) -> None:
    importance, sizes = map(list, zip(*given_experts, strict=True))
    low, high = mean * below, min(1.0, mean + (1 - mean) * above)
    ratios = ratios_for_mean(importance, sizes, mean, low, high)
    assert np.average(ratios, weights=sizes) == pytest.approx(mean, abs=1e-9)
    assert all(low <= ratio <= high for ratio in ratios)
    for (more, first), (less, second) in itertools.permutations(zip(importance, ratios, strict=True), 2):
        assert more < less or first <= second


@pytest.mark.parametrize("seed", range(4))
def test_ratios_do_the_least_damage(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    importance, sizes = numbers.lognormal(0, 2, 6), numbers.integers(1, 4, 6)
    bounds, mean = (0.3, 0.75), 0.55

    def damage(ratios: np.ndarray) -> float:
        return float(np.log((sizes * importance * np.exp(STEEPNESS * ratios)).sum()))

    ours = np.array(ratios_for_mean(importance.tolist(), sizes.tolist(), mean, *bounds))
    kept = {"type": "eq", "fun": lambda ratios: np.average(ratios, weights=sizes) - mean}
    options = {"ftol": 1e-14, "maxiter": 1000}
    theirs = minimize(
        damage, [mean] * 6, method="SLSQP", bounds=[bounds] * 6, constraints=[kept], options=options
    )
    assert theirs.success
    assert damage(ours) <= theirs.fun + 1e-9
    np.testing.assert_allclose(ours, theirs.x, atol=1e-4)


@given(
    st.lists(st.tuples(st.integers(0, 6).map(float), st.sampled_from([3, 4, 10])), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_whole_experts_come_nearest_and_cheapest(given_experts, share) -> None:
    importance, sizes = map(list, zip(*given_experts, strict=True))
    wanted = share * sum(sizes)

    def judge(chosen) -> tuple[float, float]:
        return abs(sum(sizes[e] for e in chosen) - wanted), sum(importance[e] for e in chosen)

    every = (c for n in range(len(sizes) + 1) for c in itertools.combinations(range(len(sizes)), n))
    assert judge(experts_to_prune(importance, sizes, wanted)) == min(map(judge, every))


def test_importance_is_the_share_of_a_layer_times_its_change() -> None:
    layer = ExpertProfile(routed_tokens=[6, 2, 0], gate_weight=[0, 0, 0], weighted_output_norm=[6.0, 6.0, 0])
    profile = Profile(num_tokens=8, num_samples=1, layer_similarity={4: 0.75}, experts={4: layer})
    assert importance_of("utilization", profile) == {4: pytest.approx([0.25 * 6 / 8, 0.25 * 2 / 8, 0])}
    assert importance_of("sensitivity", profile) == {4: pytest.approx([0.25 * 1 / 4, 0.25 * 3 / 4, 0])}


# In a recipe


@pytest.mark.parametrize("algorithm", UPSTREAM)
@pytest.mark.parametrize(("sparsity", "structure"), [(0.5, "0:0"), (0.3, "0:0"), (0.5, "2:4"), (0.25, "1:4")])
def test_uniform_is_upstream(folder: Path, algorithm: str, sparsity: float, structure: str) -> None:
    path = support.saved("qwen2_moe", folder)
    fields = {"sparsity": sparsity, "mask_structure": structure}
    ours, report = pruned(path, folder, algorithm=algorithm, ratios="uniform", **fields)
    theirs = support.trim(support.load(path), UPSTREAM[algorithm](targets=[EXPERTS], **fields), **IN_ORDER)
    before = support.load(path)
    for layer, expert in itertools.product(range(4), range(8)):
        weights = expert_weights(ours, layer, expert)
        assert torch.equal(weights, expert_weights(theirs, layer, expert))
        assert report["zeros"][str(layer)][expert] == (weights == 0).double().mean()
    others = {name: value for name, value in before.state_dict().items() if ".experts." not in name}
    for name, value in ours.state_dict().items():
        assert ".experts." in name or torch.equal(value, others[name]), name


@pytest.mark.parametrize("ratios", ["utilization", "sensitivity"])
def test_zeros_on_disk_are_those_of_the_report(folder: Path, tmp_path: Path, ratios: str) -> None:
    path = support.saved("qwen3_moe", folder)
    out = tmp_path / "out"
    _, report = pruned(
        path, folder, sparsity=0.4, algorithm="wanda", ratios=ratios, options={"output_dir": str(out)}
    )
    check_checkpoint(out).raise_if_errors()
    tensors = load_file(out / "model.safetensors")
    shares = {}
    for layer, expert in itertools.product(range(4), range(8)):
        name = f"model.layers.{layer}.mlp.experts.{expert}."
        weights = torch.cat([value.flatten() for key, value in tensors.items() if key.startswith(name)])
        shares[layer, expert] = float((weights == 0).double().mean())
        assert report["zeros"][str(layer)][expert] == shares[layer, expert]
        # Wanda rounds down to whole columns, of which there are 64.
        assert 0 <= report["ratios"][str(layer)][expert] - shares[layer, expert] < 1 / 64
    wanted = [ratio for row in report["ratios"].values() for ratio in row]
    assert np.mean(wanted) == pytest.approx(0.4, abs=1e-9)
    assert 0.2 <= min(wanted) < max(wanted) <= 0.7
    assert report["mean"] == pytest.approx(np.mean(list(shares.values())), abs=1e-9)
    assert "ExpertSparsityModifier: 39." in (out / "README.md").read_text()
    assert sum(sum(row) for row in report["tokens"].values()) == 4 * 2 * report["calibration"]["tokens"]


def test_structure_prunes_whole_experts(folder: Path) -> None:
    path = support.saved("mixtral", folder)
    model, report = pruned(path, folder, sparsity=0.3, mask_structure="2:4", ratios="sensitivity")
    before = support.load(path)
    chosen = 0
    for layer, expert in itertools.product(range(4), range(8)):
        weights, dense = expert_weights(model, layer, expert), expert_weights(before, layer, expert)
        ratio = report["ratios"][str(layer)][expert]
        assert ratio in (0.0, 0.5)
        if ratio:
            chosen += 1
            assert ((weights.view(-1, 4) == 0).sum(dim=1) == 2).all()
        else:
            assert torch.equal(weights, dense)
    assert chosen == round(0.3 / 0.5 * 32)
    assert report["mean"] == pytest.approx(chosen / 32 / 2)


def test_uniform_structure_takes_experts_by_seed(folder: Path) -> None:
    path = support.saved("mixtral", folder)
    fields = {"sparsity": 0.25, "mask_structure": "2:4", "ratios": "uniform", "algorithm": "wanda"}
    ratios = [pruned(path, folder, seed=seed, **fields)[1]["ratios"] for seed in (0, 0, 1)]
    assert ratios[0] == ratios[1] != ratios[2]


def test_shared_experts_are_pruned_on_demand(folder: Path) -> None:
    path = support.saved("qwen2_moe", folder)
    model, report = pruned(path, folder, sparsity=0.5, algorithm="wanda", shared="prune")
    before = support.load(path)
    for layer in range(4):
        mlp, dense = model.model.layers[layer].mlp, before.model.layers[layer].mlp
        weights = torch.cat([value.flatten() for value in mlp.shared_expert.parameters()])
        assert (weights == 0).double().mean() == 0.5 == report["shared_zeros"][str(layer)]
        assert torch.equal(mlp.shared_expert_gate.weight, dense.shared_expert_gate.weight)


# Experts without tokens


@pytest.fixture(scope="module")
def starved(folder: Path) -> Path:
    """Two experts of every layer are always chosen among 1 to 4; the others never."""
    path = folder / "starved"
    model = tiny_models.build("mixtral")
    for block in model.model.layers:
        router = block.mlp.gate.weight.data
        first, second = router[1].clone(), router[3].clone()
        router.zero_()
        router[1:5] = torch.stack([first, -first, second, -second])
    model.save_pretrained(path)
    support.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("algorithm", UPSTREAM)
@pytest.mark.parametrize("structure", ["0:0", "2:4"])
def test_starved_experts_fall_back_to_magnitude(
    folder: Path, starved: Path, algorithm: str, structure: str
) -> None:
    messages: list[str] = []
    sink = logger.add(messages.append, level="WARNING")
    options = {"moe_calibrate_all_experts": False}
    model, report = pruned(
        starved, folder, sparsity=0.45, mask_structure=structure, algorithm=algorithm, options=options
    )
    logger.remove(sink)
    (warning,) = [text for text in messages if "by magnitude" in text]
    never = [0, 5, 6, 7]
    assert report["fallback"] == {str(layer): never for layer in range(4)}
    assert "16 experts" in warning and "{0: 4, 1: 4, 2: 4, 3: 4}" in warning
    before = support.load(starved)
    for layer, expert in itertools.product(range(4), never):
        ratio = report["ratios"][str(layer)][expert]
        assert ratio == max(r for row in report["ratios"].values() for r in row)
        dense, weights = expert_weights(before, layer, expert), expert_weights(model, layer, expert)
        # Groups in which the smallest go: four neighbours, or a row; both have 64 columns.
        groups = dense.view(-1, 4 if structure == "2:4" else 64)
        gone = groups.abs().argsort(dim=1)[:, : int(groups.shape[1] * ratio)]
        assert torch.equal(weights, groups.scatter(1, gone, 0.0).flatten())
    assert torch.isfinite(support.logits(model)).all()


# Plans


def test_a_plan_is_applied_again_edited_or_not(folder: Path, tmp_path: Path) -> None:
    path = support.saved("mixtral", folder)
    model, report = pruned(path, folder, sparsity=0.4)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(report))
    again, second = pruned(path, folder, plan_path=str(plan))
    assert torch.equal(support.logits(model), support.logits(again))
    assert second["zeros"] == report["zeros"]
    report["ratios"]["2"] = [0.0] * 7 + [0.9]
    plan.write_text(json.dumps(report))
    edited, third = pruned(path, folder, plan_path=str(plan))
    assert third["zeros"]["2"][:7] == [0.0] * 7
    assert (expert_weights(edited, 2, 7) == 0).double().mean() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modifier": "LayerDropModifier"}, "its modifier is 'LayerDropModifier'"),
        ({"num_blocks": 9}, "its num_blocks is 9"),
        ({"mask_structure": "2:4"}, "mask_structure: '2:4'"),
        ({"ratios": {"1": [0.5] * 7}}, r"ratios\[1\] has 7 entries; the layer has 8"),
        ({"ratios": {"9": [0.5]}}, r"ratios\[9\] has 1 entries; the layer has 0"),
        ({"ratios": {"0": [1.0] * 8}}, r"ratios\[0\]\[0\] = 1.0 must be at least 0 and less than 1"),
        ({"shared_ratios": {"7": 0.5}}, "block 7 has no MoE layer"),
        ({"extra": 1}, "is not a saved plan"),
    ],
)
def test_plans_that_cannot_be_applied(folder: Path, tmp_path: Path, change: dict, message: str) -> None:
    plan = {"modifier": "ExpertSparsityModifier", "ratios": {"0": [0.5] * 8}} | change
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    path = support.saved("mixtral", folder)
    with pytest.raises(PlanFileError, match=message):
        pruned(path, folder, plan_path=str(tmp_path / "plan.json"))


def test_a_structure_takes_experts_whole(folder: Path, tmp_path: Path) -> None:
    plan = {
        "modifier": "ExpertSparsityModifier",
        "mask_structure": "2:4",
        "ratios": {"0": [0.5] * 7 + [0.4]},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    path = support.saved("mixtral", folder)
    with pytest.raises(PlanFileError, match=r"ratios\[0\]\[7\] = 0.4 must be one of 0.0, 0.5"):
        pruned(path, folder, plan_path=str(tmp_path / "plan.json"), mask_structure="2:4")


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of sparsity, plan_path; got none"),
        ({"sparsity": 0.5, "plan_path": "x.json"}, "got sparsity and plan_path"),
        ({"sparsity": 1.0}, "sparsity=1.0 must lie between 0 and 1"),
        ({"sparsity": 0.5, "mask_structure": "4:2"}, "mask_structure='4:2' must be '0:0'"),
        ({"sparsity": 0.5, "mask_structure": "half"}, "mask_structure='half' must be '0:0'"),
        ({"sparsity": 0.6, "mask_structure": "2:4"}, "sets at most 0.5 of the weights to zero"),
        ({"sparsity": 0.5, "min_sparsity": 0.6}, "min_sparsity=0.6 and max_sparsity=0.75 must lie"),
        ({"sparsity": 0.5, "max_sparsity": 1.0}, "max_sparsity=1 must lie"),
        ({"sparsity": 0.5, "mask_structure": "2:4", "max_sparsity": 0.5}, "max_sparsity=0.5: bounds go with"),
        ({"plan_path": "x.json", "shared": "prune"}, "shared='prune' goes with sparsity"),
        ({"sparsity": 0.5, "algorithm": "magnitude"}, "'sparsegpt' or 'wanda'"),
        ({"sparsity": 0.5, "report_path": "report.yaml"}, "must end with .json"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertSparsityModifier(**fields)


def test_refuses_columns_that_do_not_divide_and_no_data(folder: Path) -> None:
    path = support.saved("mixtral", folder)
    with pytest.raises(ValueError, match="64 columns, which is not a multiple of 5"):
        pruned(path, folder, sparsity=0.2, mask_structure="2:5")
    with pytest.raises(ValueError, match="needs calibration data"):
        pruned(path, folder, sparsity=0.2, options={"no_data": True})


@pytest.mark.parametrize(
    "first",
    [
        lambda: QuantizationModifier(config_groups=w4a16(), ignore=["lm_head"]),
        lambda: RouterAwareQuantModifier(schemes=["W8A16"], target_bits=9, group_size=32),
    ],
    ids=["quantization", "router_aware"],
)
def test_refuses_quantized_experts(folder: Path, first) -> None:
    path = support.saved("mixtral", folder)
    with pytest.raises(ValueError, match="ut ExpertSparsityModifier before "):
        support.trim(support.load(path), [first(), ExpertSparsityModifier(sparsity=0.5)])


# With others

OTHERS = {
    "layer": lambda: LayerDropModifier(num_drop=1),
    "block": lambda: BlockDropModifier(num_drop=1),
    "expert": lambda: ExpertDropModifier(num_drop=2),
    "reap": lambda: REAPPruningModifier(sparsity=0.25),
    "sparsegpt": lambda: SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=[EXPERTS]),
    "gptq": lambda: GPTQModifier(config_groups=w4a16(), ignore=["lm_head"], block_size=32),
}
ORDERS = [*[(name, "ours") for name in OTHERS if name != "gptq"], *[("ours", name) for name in OTHERS]]


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_any_order(folder: Path, tmp_path: Path, order: tuple[str, ...], pipeline: str) -> None:
    path, out = support.saved("mixtral", folder), tmp_path / "out"
    ours = ExpertSparsityModifier(sparsity=0.5, algorithm="wanda", report_path=str(tmp_path / "report.json"))
    recipe = [ours if name == "ours" else OTHERS[name]() for name in order]
    model = support.trim(support.load(path), recipe, pipeline=pipeline, output_dir=str(out))
    check_checkpoint(out).raise_if_errors()
    expected = support.logits(model)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(support.logits(support.load(out)), expected, atol=1e-5, rtol=0)
    report = json.loads((tmp_path / "report.json").read_text())
    first_or_shared = order[0] != "ours" or pipeline == "sequential"
    assert len(report["ratios"]) == 4 - bool(first_or_shared and {"layer", "block"} & set(order))
    wanted = [ratio for row in report["ratios"].values() for ratio in row if ratio is not None]
    assert np.mean(wanted) == pytest.approx(0.5, abs=1e-9)
