"""RouterAwareQuantModifier from recipe to reloaded checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmcompressor_moe import (
    BlockDropModifier,
    ExpertDropModifier,
    LayerDropModifier,
    RouterAwareQuantModifier,
)
from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.checkpoint.names import expert_names
from llmcompressor_moe.profile.splitting import split_held_out
from llmcompressor_moe.quantization.report import QuantReport
from llmcompressor_moe.topology import expert_modules, find_topology

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def quantize(
    base: Path, out: Path, *before: Any, options: dict[str, Any] | None = None, **fields: Any
) -> tuple[PreTrainedModel, QuantReport]:
    settings = {"group_size": 32, "report_path": str(out.with_suffix(".json")), **fields}
    if "target_size" not in settings and "plan_path" not in settings:
        settings.setdefault("target_bits", 6.5)
    recipe = [*before, RouterAwareQuantModifier(**settings)]
    model = support.trim(support.load(base), recipe, output_dir=str(out), **(options or {}))
    return model, QuantReport.load(settings["report_path"])


def on_disk(out: Path) -> int:
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def reload_equal(model: PreTrainedModel, out: Path) -> None:
    expected = support.logits(model)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(support.logits(support.load(out)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schemes", [["W4A16", "W8A16"], ["W4A16", "UNQUANTIZED"]], ids="-".join)
def test_layers_in_different_schemes(
    family: str, schemes: list[str], directory: Path, tmp_path: Path
) -> None:
    bits = 7.4 if "W8A16" in schemes else 20.0
    base = support.saved(family, directory)
    before = [LayerDropModifier(layers=[2]), ExpertDropModifier(experts={1: [0, 5], 3: [1, 2, 4, 7]})]
    model, report = quantize(base, tmp_path / "out", *before, schemes=schemes, target_bits=bits)
    assert {plan.scheme for plan in report.layers.values()} == set(schemes)
    assert 2 not in report.layers
    assert report.mean_bits <= bits
    assert on_disk(tmp_path / "out") == pytest.approx(report.nbytes, rel=0.01)
    assert on_disk(tmp_path / "out") <= report.nbytes
    assert check_checkpoint(tmp_path / "out").ok
    reload_equal(model, tmp_path / "out")


def test_the_config_names_every_layer_under_both_namings(directory: Path, tmp_path: Path) -> None:
    _, report = quantize(support.saved("mixtral", directory), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    names = expert_names(AutoConfig.from_pretrained(tmp_path / "out"))
    for layer, plan in report.layers.items():
        for name in ("gate_proj", "up_proj", "down_proj"):
            path = f"model.layers.{layer}.mlp.experts.3.{name}"
            for spelling in names.spellings(path):
                groups = [
                    group
                    for group in config["config_groups"].values()
                    if any(re.match(target.removeprefix("re:"), spelling) for target in group["targets"])
                ]
                assert len(groups) == 1
                assert groups[0]["weights"]["num_bits"] == int(plan.scheme[1])
    stored = load_file(tmp_path / "out/model.safetensors")
    assert any(".w1.weight_packed" in name for name in stored)
    assert not any("gate_proj" in name for name in stored)


@pytest.mark.parametrize("limit", [440_000, 500_000, 580_000])
def test_target_size_is_used_and_never_exceeded(limit: int, directory: Path, tmp_path: Path) -> None:
    base = support.saved("qwen3_moe", directory)
    fields = {"schemes": ["W3A16", "W4A16", "W6A16", "W8A16"], "attention_scheme": "W8A16"}
    _, report = quantize(base, tmp_path / "out", target_size=limit, **fields)
    assert on_disk(tmp_path / "out") <= report.nbytes <= limit
    assert report.nbytes > 0.9 * limit


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen2_moe", {"attention_scheme": "W8A16", "dense_scheme": "W4A16"}),
        (
            "deepseek_v2",
            {
                "attention_scheme": "FP8_DYNAMIC",
                "dense_scheme": "W8A16",
                "ignore": ["re:.*kv_b_proj", "lm_head"],
            },
        ),
        ("mixtral", {"schemes": ["FP8_DYNAMIC", "W4A16"]}),
        ("mixtral", {"schemes": ["W8A8", "W4A16"]}),
        ("qwen3_moe", {"schemes": [{"w4c": {"weights": {"num_bits": 4, "strategy": "channel"}}}, "W8A16"]}),
        ("mixtral", {"granularity": "expert"}),
        ("granitemoe", {"servable": False}),
        # its config says per layer that no layer differs
        ("gemma4_text", {}),
    ],
    ids=str,
)
def test_schemes_of_many_kinds(family: str, fields: dict[str, Any], directory: Path, tmp_path: Path) -> None:
    base = support.saved(family, directory)
    model, report = quantize(base, tmp_path / "out", **{"target_bits": 7.0, **fields})
    assert on_disk(tmp_path / "out") == pytest.approx(report.nbytes, rel=0.01)
    reload_equal(model, tmp_path / "out")
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if ".self_attn." in name and isinstance(module, torch.nn.Linear):
            ignored = "kv_b_proj" in name and "ignore" in fields
            assert (scheme is not None) == ("attention_scheme" in fields and not ignored), name
        if "gate" in name.rpartition(".")[2] and "gate_proj" not in name:
            assert scheme is None, name


def test_experts_apart_are_for_research(directory: Path, tmp_path: Path) -> None:
    _, report = quantize(support.saved("mixtral", directory), tmp_path / "out", granularity="expert")
    assert any(len(set(plan.scheme.values())) > 1 for plan in report.layers.values())
    findings = check_checkpoint(tmp_path / "out").errors
    assert {finding.code for finding in findings} == {"moe-mixed-schemes"}
    assert "vLLM cannot serve" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4A16", "FP8"])
def test_float_schemes_in_bfloat16(scheme: str, directory: Path, tmp_path: Path) -> None:
    base = support.saved("mixtral", directory)
    recipe = RouterAwareQuantModifier(schemes=[scheme, "UNQUANTIZED"], target_bits=12.0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = support.trim(model, recipe, output_dir=str(tmp_path / "out"))
    assert check_checkpoint(tmp_path / "out").ok
    expected = support.logits(model).float()
    assert torch.isfinite(expected).all()
    stored = load_file(tmp_path / "out/model.safetensors")
    scales = [
        tensor for name, tensor in stored.items() if name.endswith("input_scale") or "global_scale" in name
    ]
    assert scales or scheme == "MXFP4A16"
    assert all(torch.isfinite(tensor.float()).all() and (tensor.float() > 0).all() for tensor in scales)


# What the report says


def test_the_report_says_what_it_did(directory: Path, tmp_path: Path) -> None:
    base = support.saved("mixtral", directory)
    ids = support.token_ids(16, 24)
    model, report = quantize(base, tmp_path / "out", options={"ids": ids}, attention_scheme="W4A16")
    assert report.held_out
    assert report.calibration == {"tokens": 14 * 24, "samples": 14}
    intact = support.load(base)
    batches = [{"input_ids": row[None]} for row in ids]
    held = torch.cat([batch["input_ids"] for batch in split_held_out(batches)[1]])
    assert held.shape == (2, 24)
    traces = [choices(intact, held), choices(model, held)]
    for layer, plan in report.layers.items():
        assert plan.bits == {"W4A16": 5.0, "W8A16": 9.0}[plan.scheme]
        assert plan.predicted_error == pytest.approx(plan.candidates[plan.scheme])
        assert plan.measured_error == pytest.approx(plan.predicted_error, rel=0.7)
        before, after = (trace[layer] for trace in traces)
        overlap = [len(set(a) & set(b)) / 2 for a, b in zip(before.tolist(), after.tolist(), strict=True)]
        assert plan.routing.top_k_overlap == pytest.approx(sum(overlap) / len(overlap), abs=1e-6)
        loads = [torch.bincount(chosen.flatten(), minlength=8).double() for chosen in (before, after)]
        assert plan.routing.dead_before == int((loads[0] == 0).sum())
        assert plan.routing.load_cv_after == pytest.approx(
            float(loads[1].std(correction=0) / loads[1].mean())
        )
        change = (loads[0] - loads[1]).abs().sum() / (2 * loads[0].sum())
        assert plan.routing.load_change == pytest.approx(float(change), abs=1e-9)
        assert plan.routing.router_kl >= 0
    assert min(plan.routing.top_k_overlap for plan in report.layers.values()) < 1
    history = json.loads((tmp_path / "out/trimming.json").read_text())
    assert [entry["modifier"] for entry in history] == ["RouterAwareQuantModifier"]
    assert "in W4A16" in (tmp_path / "out/README.md").read_text()


def choices(model: PreTrainedModel, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Block -> experts that stock transformers' router returns, [tokens, top_k]."""
    found: dict[int, torch.Tensor] = {}
    handles = [
        model.get_submodule(moe.router).register_forward_hook(
            lambda _m, _a, output, layer=layer: found.__setitem__(layer, output[2])
        )
        for layer, moe in find_topology(model).moe_layers.items()
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


# The plan


def test_a_plan_is_applied_again_without_data(directory: Path, tmp_path: Path) -> None:
    base = support.saved("mixtral", directory)
    drop = ExpertDropModifier(experts={1: [0], 2: [3]})
    _, report = quantize(base, tmp_path / "first", drop, attention_scheme="W8A16")
    _, copy = quantize(
        base,
        tmp_path / "again",
        ExpertDropModifier(experts={1: [0], 2: [3]}),
        options={"no_data": True},
        plan_path=str(tmp_path / "first.json"),
        report_path=str(tmp_path / "again.json"),
        attention_scheme="W8A16",
    )
    assert {i: p.scheme for i, p in copy.layers.items()} == {i: p.scheme for i, p in report.layers.items()}
    assert copy.nbytes == report.nbytes
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_edited_plan_is_what_happens(directory: Path, tmp_path: Path) -> None:
    base = support.saved("mixtral", directory)
    quantize(base, tmp_path / "first")
    plan = json.loads((tmp_path / "first.json").read_text())
    for index, scheme in zip("0123", ["W8A16", "UNQUANTIZED", "W8A16", "W4A16"], strict=True):
        plan["layers"][index]["scheme"] = scheme
    plan["schemes"]["UNQUANTIZED"] = None
    plan["schemes"]["W8A16"] = {"weights": {"num_bits": 8, "strategy": "channel", "symmetric": True}}
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    model, _ = quantize(
        base,
        tmp_path / "second",
        options={"no_data": True},
        plan_path=str(tmp_path / "edited.json"),
        report_path=str(tmp_path / "second.json"),
    )
    bits = {}
    for index, moe in find_topology(model).moe_layers.items():
        experts = expert_modules(model.get_submodule(moe.experts))
        scheme = getattr(experts[0].up_proj, "quantization_scheme", None) if experts else None
        bits[index] = (scheme.weights.num_bits, str(scheme.weights.strategy)) if scheme else None
    assert bits[1] is None
    assert [bits[i][0] for i in (0, 2, 3)] == [8, 8, 4]
    assert "channel" in bits[0][1]
    reload_equal(model, tmp_path / "second")


def test_same_data_and_seed_give_the_same_plan(directory: Path, tmp_path: Path) -> None:
    base = support.saved("olmoe", directory)
    reports = [quantize(base, tmp_path / name)[1] for name in ("one", "two")]
    for report in reports:
        report.settings.pop("report_path")
    assert reports[0] == reports[1]


def test_recipe_in_yaml(directory: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "default_stage:\n  default_modifiers:\n    RouterAwareQuantModifier:\n"
        "      schemes: [W4A16, W8A16, {w4: {weights: {num_bits: 4, strategy: channel, symmetric: true}}}]\n"
        "      group_size: 32\n      target_size: 590 KB\n      algorithm: rtn\n"
    )
    model = support.load(support.saved("mixtral", directory))
    model = support.trim(model, str(recipe), output_dir=str(tmp_path / "out"))
    assert on_disk(tmp_path / "out") <= 590_000
    assert check_checkpoint(tmp_path / "out").ok
    reload_equal(model, tmp_path / "out")


def test_ignored_layers_stay(directory: Path, tmp_path: Path) -> None:
    ignore = ["lm_head", r"re:.*layers\.1\..*experts.*"]
    _, report = quantize(
        support.saved("mixtral", directory), tmp_path / "out", ignore=ignore, target_bits=5.0
    )
    assert set(report.layers) == {0, 2, 3}
    stored = load_file(tmp_path / "out/model.safetensors")
    assert not any("layers.1." in name and "packed" in name for name in stored)
    assert any("layers.0." in name and "packed" in name for name in stored)


# Algorithms


@pytest.mark.parametrize(
    ("algorithm", "family", "fields"),
    [
        ("gptq", "mixtral", {}),
        ("gptq", "qwen3_moe", {}),
        ("awq", "mixtral", {}),
        ("awq", "qwen3_moe", {}),
        # One norm before experts in groups and shared experts in channels.
        ("awq", "glm4_moe", {"dense_scheme": "FP8_DYNAMIC"}),
    ],
)
def test_algorithms_of_upstream(
    algorithm: str, family: str, fields: dict[str, Any], directory: Path, tmp_path: Path
) -> None:
    base = support.saved(family, directory)
    options = {"ids": support.token_ids(16, 32)}
    plain, _ = quantize(base, tmp_path / "rtn", options=options, **fields)
    model, report = quantize(base, tmp_path / algorithm, options=options, algorithm=algorithm, **fields)
    assert on_disk(tmp_path / algorithm) == pytest.approx(report.nbytes, rel=0.01)
    reload_equal(model, tmp_path / algorithm)
    assert not torch.allclose(support.logits(model), support.logits(plain), atol=1e-5)
    # A smoothing that forgot the router would send most tokens elsewhere.
    assert all(plan.routing.top_k_overlap > 0.7 for plan in report.layers.values())


def test_gptq_is_upstreams(directory: Path, tmp_path: Path) -> None:
    """One scheme everywhere: the same weights as GPTQModifier alone gives."""
    base = support.saved("mixtral", directory)
    quantize(base, tmp_path / "ours", schemes=["W4A16"], target_bits=5.0, algorithm="gptq")
    weights = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    groups = {"experts": QuantizationScheme(targets=[r"re:.*experts\.\d+\..*_proj$"], weights=weights)}
    recipe = [LayerDropModifier(threshold=2.0), GPTQModifier(config_groups=groups)]
    support.trim(support.load(base), recipe, output_dir=str(tmp_path / "theirs"))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("algorithm", "schemes"),
    [("rtn", ["FP8"]), ("gptq", ["W4A16", "W8A16"]), ("awq", ["W4A16", "W8A16"])],
)
def test_starved_experts_get_scales(
    algorithm: str, schemes: list[str], directory: Path, tmp_path: Path
) -> None:
    base = support.saved("mixtral", directory)
    messages: list[str] = []
    handle = logger.add(messages.append, level="WARNING")
    # Few tokens for 8 experts, and upstream told not to send every token to all of them.
    options = {"ids": support.token_ids(2, 2), "moe_calibrate_all_experts": False}
    try:
        model, report = quantize(
            base, tmp_path / "out", options=options, algorithm=algorithm, schemes=schemes, target_bits=9.0
        )
    finally:
        logger.remove(handle)
    assert any(0 in plan.routed_tokens for plan in report.layers.values())
    assert all(plan.starved_experts for plan in report.layers.values())
    assert any("too few calibration tokens" in message for message in messages)
    if algorithm != "awq":
        assert report.algorithm_notes and any("no token reached them" in message for message in messages)
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        if name.endswith("weight_packed"):
            assert len(tensor.unique()) > 1, f"{name} is all zeros"
        if name.endswith("scale"):
            values = tensor.float()
            assert torch.isfinite(values).all() and (values > 0).all() and (values < 1e3).all(), name
    reload_equal(model, tmp_path / "out")


def test_rounded_routers_are_guarded(directory: Path, tmp_path: Path) -> None:
    base = support.saved("mixtral", directory)
    plain, _ = quantize(base, tmp_path / "plain")
    model, report = quantize(base, tmp_path / "out", router="W8A16", max_routing_change=0.3)
    assert 0 <= report.router_change <= 0.3
    names = [moe.router for moe in find_topology(model).moe_layers.values()]
    for name in names:
        ours, before = (m.get_submodule(name).weight for m in (model, plain))
        assert not torch.equal(ours, before)
        torch.testing.assert_close(ours, before, atol=float(before.abs().max()) / 100, rtol=0)
    with pytest.raises(ValueError, match=r"router='W2A16' would change .* max_routing_change=0.01 allows"):
        quantize(base, tmp_path / "refused", router="W2A16", max_routing_change=0.01)
    assert not (tmp_path / "refused").exists()


KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def router_aware(**fields: object) -> RouterAwareQuantModifier:
    return RouterAwareQuantModifier(schemes=["W8A16"], group_size=32, target_bits=9, **fields)


@pytest.mark.parametrize(
    "recipe",
    [
        lambda: [QuantizationModifier(kv_cache_scheme=KV_CACHE), router_aware()],
        lambda: [router_aware(), QuantizationModifier(kv_cache_scheme=KV_CACHE)],
        lambda: [router_aware(kv_cache_scheme=KV_CACHE)],
        lambda: [router_aware(kv_cache_scheme=KV_CACHE, algorithm="gptq")],
        lambda: [
            router_aware(kv_cache_scheme=KV_CACHE, attention_scheme="W8A16"),
            BlockDropModifier(blocks=[1]),
        ],
    ],
    ids=["beside, before", "beside, after", "field", "field with gptq", "field with attention and a drop"],
)
def test_a_quantized_kv_cache(recipe: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    support.trim(support.load(support.saved("qwen3_moe", tmp_path)), recipe(), output_dir=str(out))
    written = json.loads((out / "config.json").read_text())
    quantization = written["quantization_config"]
    assert {name: quantization["kv_cache_scheme"][name] for name in KV_CACHE} == KV_CACHE
    assert all(group["weights"]["num_bits"] == 8 for group in quantization["config_groups"].values())
    tensors = load_file(out / "model.safetensors")
    for name in ("k_scale", "v_scale"):
        scales = [tensor for key, tensor in tensors.items() if key.endswith(name)]
        assert len(scales) == written["num_hidden_layers"] and all((scale > 0).all() for scale in scales)
    assert any(".experts." in key and key.endswith("weight_packed") for key in tensors)
    assert check_checkpoint(out).ok


def test_a_kv_cache_is_quantized_once(tmp_path: Path) -> None:
    model = support.load(support.saved("qwen3_moe", tmp_path))
    recipe = [QuantizationModifier(kv_cache_scheme=KV_CACHE), router_aware(kv_cache_scheme=KV_CACHE)]
    with pytest.raises(ValueError, match="quantizes the KV cache as well"):
        support.trim(model, recipe)
