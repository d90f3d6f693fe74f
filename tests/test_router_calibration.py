"""RouterCalibrationModifier: what it wins, what it leaves alone, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import composition_table
import pytest
import support
import tiny_models
import torch
from compressed_tensors.offload.module import offload_module, remove_module_offload
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmcompressor_moe import (
    ExpertDropModifier,
    LayerDropModifier,
    RouterAwareQuantModifier,
    RouterCalibrationModifier,
)
from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.demo import DEMO_MODEL, calibration_dataset, heldout_rows
from llmcompressor_moe.evaluation import perplexity
from llmcompressor_moe.recovery.router_calibration.recording import record_layers
from llmcompressor_moe.recovery.router_calibration.report import RouterCalibrationReport
from llmcompressor_moe.topology import find_topology

HALF = {"mixtral": 4, "qwen2_moe": 4, "olmoe": 4, "deepseek_v3": 4, "granitemoe": 4, "gpt_oss": 4}


def calibrated(
    base: Path,
    tmp_path: Path,
    *before: Any,
    output: Path | None = None,
    pipeline: str = "independent",
    **fields: Any,
) -> tuple[PreTrainedModel, RouterCalibrationReport]:
    path = tmp_path / "report.json"
    modifier = RouterCalibrationModifier(report_path=str(path), **fields)
    options = {"pipeline": pipeline, **({"output_dir": str(output)} if output else {})}
    ids = support.token_ids(24)
    model = support.trim(support.load(base), [*before, modifier], ids=ids, **options)
    return model, RouterCalibrationReport.load(path)


def changed(before: PreTrainedModel, after: PreTrainedModel) -> set[str]:
    """Names of the parameters that differ."""
    values = dict(before.named_parameters())
    return {name for name, value in after.named_parameters() if not torch.equal(value, values[name])}


def test_wins_back_a_fifth_of_what_dropping_half_of_the_experts_cost(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    rows = torch.tensor(heldout_rows(tokenizer)[::3])

    def after(*more: Any) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
        recipe = [ExpertDropModifier(num_drop=4), *more]
        return oneshot(model=model, recipe=recipe, dataset=calibration_dataset(tokenizer))

    base = perplexity(AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32), rows)
    plain, fitted = after(), after(RouterCalibrationModifier(report_path=str(tmp_path / "report.json")))
    dropped, mended = perplexity(plain, rows), perplexity(fitted, rows)
    moved = changed(plain, fitted)
    assert len(moved) == 2 * 8
    assert all(name.endswith(("gate.weight", "post_attention_layernorm.weight")) for name in moved)
    assert (dropped - mended) / (dropped - base) >= 0.2
    report = RouterCalibrationReport.load(tmp_path / "report.json")
    assert report.kept and report.held_out and report.objective == "output"
    assert report.divergence_after < report.divergence_before
    assert math.log(mended / base) < math.log(dropped / base)


@pytest.mark.parametrize("objective", ["output", "layer"])
@pytest.mark.parametrize("model_type", HALF)
def test_only_what_was_named_moves(model_type: str, objective: str, tmp_path: Path) -> None:
    base = support.saved(model_type, tmp_path, num_experts=8, top_k=2)
    drop = {"experts": {index: [0, 1, 2, 3] for index in find_topology(support.load(base)).moe_layers}}
    if model_type == "deepseek_v3":
        drop = {"experts": {index: [0, 1, 4, 5] for index in drop["experts"]}}
    plain = support.trim(support.load(base), [ExpertDropModifier(**drop)], ids=support.token_ids(24))
    model, report = calibrated(
        base, tmp_path, ExpertDropModifier(**drop), objective=objective, learning_rate=0.02
    )
    routers = [moe.router for moe in find_topology(model).moe_layers.values()]
    norms = {f"{block.name}.post_attention_layernorm.weight" for block in find_topology(model).blocks}
    moved = changed(plain, model)
    assert report.kept == bool(moved)
    assert all(name in norms or name.startswith(tuple(routers)) for name in moved), moved
    assert set(report.layers) == set(find_topology(model).moe_layers)
    by_layer = [layer for layer in report.layers.values() if layer.kept]
    if objective == "layer":
        assert all(layer.error_after < layer.error_before for layer in by_layer)
    if report.kept:
        assert report.divergence_after < report.divergence_before
    assert torch.isfinite(support.logits(model)).all()


def test_pipelines_agree(tmp_path: Path) -> None:
    """Upstream's sequential pipeline runs a recipe's ends while the LM head is out."""
    base = support.saved("mixtral", tmp_path)
    drop = {"experts": {0: [0, 1], 2: [3]}}
    models, reports = zip(
        *(
            calibrated(
                base,
                tmp_path,
                ExpertDropModifier(**drop),
                objective="output",
                learning_rate=0.02,
                pipeline=pipeline,
            )
            for pipeline in ("independent", "sequential")
        ),
        strict=True,
    )
    one, other = reports
    assert one.divergence_before == pytest.approx(other.divergence_before, rel=1e-4)
    for index, layer in one.layers.items():
        assert layer.error_after != layer.error_before
        assert layer.error_after == pytest.approx(other.layers[index].error_after, rel=1e-3)
    torch.testing.assert_close(support.logits(models[0]), support.logits(models[1]), atol=1e-4, rtol=1e-3)


def test_what_does_not_help_is_undone(tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    drop = ExpertDropModifier(experts={0: [0]})
    plain = support.trim(support.load(base), [ExpertDropModifier(experts={0: [0]})], no_data=True)
    model, report = calibrated(base, tmp_path, drop, learning_rate=0.99, steps=15, parts=["router", "scales"])
    assert not report.kept
    assert report.divergence_after == report.divergence_before
    assert not changed(plain, model)
    assert "did not help" in report.describe()


def test_figures_are_those_of_plain_hooks(tmp_path: Path) -> None:
    """KL and errors of a model that calibration leaves as it is, against transformers' own forward."""
    base = support.saved("qwen2_moe", tmp_path)
    untouched = support.load(base)
    # An untouched model but for one layer; a rate that changes nothing.
    model, report = calibrated(
        base, tmp_path, ExpertDropModifier(experts={1: [0]}), learning_rate=1e-12, steps=1
    )
    ids = support.token_ids(24)
    from llmcompressor_moe.profile.splitting import split_held_out

    held = split_held_out([{"input_ids": row[None]} for row in ids])[1]
    kls = [
        functional.kl_div(
            support.logits(model, batch["input_ids"]).log_softmax(-1).flatten(0, 1),
            support.logits(untouched, batch["input_ids"]).log_softmax(-1).flatten(0, 1),
            reduction="batchmean",
            log_target=True,
        )
        for batch in held
    ]
    assert report.divergence_before == pytest.approx(float(torch.stack(kls).mean()), rel=1e-4)

    def outputs(stock: PreTrainedModel, index: int) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = stock.model.layers[index].mlp.register_forward_hook(lambda m, a, o: seen.append(o))
        for batch in held:
            support.logits(stock, batch["input_ids"])
        hook.remove()
        return torch.cat([values.flatten(0, 1) for values in seen])

    for index, layer in report.layers.items():
        wanted, given = outputs(untouched, index), outputs(model, index)
        expected = float((given - wanted).square().sum() / wanted.square().sum())
        assert layer.error_before == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_factors_are_in_the_weights(tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    drop = {layer: [0, 1, 2] for layer in find_topology(support.load(base)).moe_layers}
    plain = support.trim(support.load(base), [ExpertDropModifier(experts=drop)], no_data=True)
    model, report = calibrated(
        base, tmp_path, ExpertDropModifier(experts=drop), parts=["scales"], objective="layer"
    )
    assert report.kept
    before, after = dict(plain.named_parameters()), dict(model.named_parameters())
    for index, layer in report.layers.items():
        name = f"model.layers.{index}.mlp.experts.down_proj"
        factors = torch.tensor(layer.factors or [1.0] * len(before[name]))
        torch.testing.assert_close(after[name], before[name] * factors[:, None, None])
        assert not layer.kept or (factors != 1).any()
    assert all(name.endswith("down_proj") for name in changed(plain, model))


@pytest.mark.parametrize("quantized", [False, True])
def test_checkpointing_saves_memory_and_changes_nothing(quantized: bool, tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    found, kept = [], []
    for checkpointing in (False, True):
        before: list[Any] = [ExpertDropModifier(experts={0: [0, 1], 2: [3]})]
        if quantized:
            before += [RouterAwareQuantModifier(target_bits=6.5, group_size=32)]
        saved = 0

        def count(value: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            _, report = calibrated(
                base, tmp_path, *before, objective="output", gradient_checkpointing=checkpointing
            )
        found.append({index: layer.error_after for index, layer in report.layers.items()})
        kept.append(saved)
        assert all(layer.error_after != layer.error_before for layer in report.layers.values())
    assert found[0] == found[1]
    assert 0 < kept[1] < kept[0] / 5


@pytest.mark.parametrize("schemes", [["W4A16", "W8A16"], ["W8A8"]], ids="-".join)
def test_after_quantization(schemes: list[str], tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    out = tmp_path / "out"
    quantize = RouterAwareQuantModifier(schemes=schemes, target_bits=9.5, group_size=32)
    model, report = calibrated(
        base,
        tmp_path,
        ExpertDropModifier(num_drop=2),
        quantize,
        output=out,
        parts=["router", "norms", "scales"],
    )
    assert report.divergence_after <= report.divergence_before
    assert check_checkpoint(out).ok
    loaded = support.load(out)
    torch.testing.assert_close(support.logits(loaded), support.logits(model), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["gptq", "awq", "wanda", "reap"])
def test_behind_upstreams_modifiers(name: str, tmp_path: Path) -> None:
    base, out = support.saved("mixtral", tmp_path), tmp_path / "out"
    made = composition_table.PARTS[name].make()
    model, report = calibrated(
        base,
        tmp_path,
        *made,
        output=out,
        pipeline="sequential",
        learning_rate=0.02,
        parts=["router", "norms"],
    )
    assert report.divergence_after <= report.divergence_before
    assert any(layer.error_after != layer.error_before for layer in report.layers.values())
    assert check_checkpoint(out).ok
    torch.testing.assert_close(support.logits(support.load(out)), support.logits(model), atol=1e-4, rtol=1e-3)


def test_offloaded_models_are_calibrated_by_layer(tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    drop = {0: [0, 1, 2], 1: [1, 2, 3]}

    def run(offload: bool) -> tuple[PreTrainedModel, RouterCalibrationReport]:
        model = linearize_moe(support.load(base))
        if offload:
            for module in model.modules():
                remove_module_offload(module)
                offload_module(module, "cpu", "disk", offload_dir=str(tmp_path))
        path = tmp_path / "report.json"
        objective = "auto" if offload else "layer"
        recipe = [
            ExpertDropModifier(experts=drop),
            RouterCalibrationModifier(objective=objective, report_path=str(path), parts=["router", "scales"]),
        ]
        return support.trim(model, recipe, ids=support.token_ids(16)), RouterCalibrationReport.load(path)

    model, plain = run(offload=False)
    offloaded_model, offloaded = run(offload=True)
    assert offloaded.objective == plain.objective == "layer"
    assert offloaded.divergence_before is None
    for index, layer in offloaded.layers.items():
        assert layer.error_before == pytest.approx(plain.layers[index].error_before, rel=1e-4)
        assert layer.error_after == pytest.approx(plain.layers[index].error_after, rel=1e-3)
    # Adam takes the sign of gradients that are hardly more than rounding.
    if plain.kept:
        torch.testing.assert_close(
            support.logits(offloaded_model), support.logits(model), atol=5e-3, rtol=1e-2
        )


def test_dropped_layers_are_passed_over(tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    _, report = calibrated(base, tmp_path, LayerDropModifier(layers=[1]))
    layers = set(find_topology(support.load(base)).moe_layers)
    assert set(report.layers) == layers - {1}


def test_two_passes_keep_the_same_tokens() -> None:
    model = linearize_moe(tiny_models.build("mixtral"))
    ids, mask = support.token_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 5:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    topology = find_topology(model)
    first = record_layers(model, topology, [0], batches, 10)[0]
    again = record_layers(model, topology, [0], batches, 10)[0]
    assert torch.equal(first.inputs, again.inputs) and len(first.inputs) == len(first.outputs) == 10
    every = record_layers(model, topology, [0], batches, 1000)[0]
    assert len(every.inputs) == int(mask.sum())
    assert first.norm == "model.layers.0.post_attention_layernorm"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"parts": ["router", "attention"]}, "parts=.*must name some of router, norms, scales"),
        ({"parts": []}, "must name some of"),
        ({"plan_path": "plan.json"}, "cannot repeat a fit without data"),
        ({"objective": "logits"}, "objective"),
        ({"share": 0}, "share"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": 1.5}, "learning_rate"),
    ],
)
def test_bad_fields(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RouterCalibrationModifier(**fields)


def test_refused_before_any_work(tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    with pytest.raises(ValueError, match="none: put it after the drops"):
        support.trim(support.load(base), [RouterCalibrationModifier()])
    drop = ExpertDropModifier(experts={0: [0]})
    with pytest.raises(ValueError, match="needs calibration data"):
        support.trim(support.load(base), [drop, RouterCalibrationModifier()], no_data=True)
    model = linearize_moe(support.load(base))
    for module in model.modules():
        remove_module_offload(module)
        offload_module(module, "cpu", "disk", offload_dir=str(tmp_path))
    with pytest.raises(ValueError, match="offloaded: use objective='layer'"):
        support.trim(
            model, [ExpertDropModifier(experts={0: [0]}), RouterCalibrationModifier(objective="output")]
        )
