"""Expert Width: channels cut out of experts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import support
import tiny_models
import torch
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.recipe import Recipe
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from llmcompressor_moe import BlockDropModifier, ExpertWidthModifier, open_moe
from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.counts import damage_curve
from llmcompressor_moe.criteria.channels import fitted_down, keep_by_surgery
from llmcompressor_moe.demo import DEMO_MODEL, calibration_dataset, heldout_rows
from llmcompressor_moe.forecast import forecast
from llmcompressor_moe.profile.channels import ChannelSums, RoutedChannels
from llmcompressor_moe.profile.observing import observe_batches
from llmcompressor_moe.report import WidthReport
from llmcompressor_moe.surgery.session import TrimSession
from llmcompressor_moe.surgery.width import width_of
from llmcompressor_moe.topology import find_topology


@pytest.fixture(autouse=True)
def _fresh_session() -> None:
    reset_session()


# Mathematics


def sample(width: int = 8, hidden: int = 5, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of channels that depend on each other, and a down projection."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix
    return inputs, torch.randn(hidden, width, generator=generator, dtype=torch.float64)


def ridge(inputs: torch.Tensor) -> float:
    moments = inputs.T @ inputs
    return float(moments.diagonal().mean()) * 0.01 * (1 + 10 * inputs.shape[1] / len(inputs))


def regression(inputs: torch.Tensor, down: torch.Tensor, kept: list[int]) -> tuple[torch.Tensor, float]:
    """The same by least squares on the data itself: fitted weights, and what is left of the error."""
    penalty = ridge(inputs) ** 0.5
    width = inputs.shape[1]
    rows = torch.cat([inputs, penalty * torch.eye(width, dtype=torch.float64)])
    fitted = torch.linalg.lstsq(rows[:, kept], rows @ down.T).solution.T
    return fitted, float((rows @ down.T - rows[:, kept] @ fitted.T).square().sum())


def test_the_fit_is_least_squares() -> None:
    inputs, down = sample()
    kept = [0, 2, 3, 6, 7]
    found = fitted_down(inputs.T @ inputs, down, kept, len(inputs))
    torch.testing.assert_close(found, regression(inputs, down, kept)[0], atol=1e-9, rtol=0)


def test_surgery_takes_what_costs_least_each_time() -> None:
    inputs, down = sample()
    left = list(range(8))
    while len(left) > 4:
        errors = {c: regression(inputs, down, [other for other in left if other != c])[1] for c in left}
        left.remove(min(errors, key=errors.get))
        assert keep_by_surgery(inputs.T @ inputs, down, len(left), len(inputs)) == left


# Families


def reference(path: Path, report: dict) -> PreTrainedModel:
    """The model of a checkpoint with the down projections' columns of channels that go set to zero."""
    model = support.load(path)
    layers = find_topology(model).moe_layers
    with torch.no_grad():
        for layer, experts in report["kept"].items():
            moe = layers[int(layer)]
            fused = model.get_submodule(moe.experts)
            old = report["widths"][layer][0]
            for name, text in experts.items():
                bits = f"{int(text, 16):0{4 * len(text)}b}"
                gone = [
                    channel
                    for channel in range(len(bits))
                    if bits[channel] == "0" and channel < 4 * len(text)
                ]
                if name.startswith("shared"):
                    down = model.get_submodule(moe.shared_experts[int(name.split()[1])]).down_proj.weight
                    down[:, [channel for channel in gone if channel < down.shape[1]]] = 0
                    continue
                down = fused.down_proj[int(name)]
                gone = [channel for channel in gone if channel < old]
                # Llama 4 follows no interface that would say it.
                if getattr(fused, "is_transposed", "Llama4" in type(fused).__name__):
                    down[gone] = 0
                else:
                    down[:, gone] = 0
    return model


# Family -> what stops it.
REFUSED = {
    "ernie4_5_vl_moe": "one width for the experts of text and one for those of images",
    "inkling_text": "is not made of Linear modules",
    "jamba": "intermediate_size is also the width of model.layers.0.feed_forward",
}


@pytest.mark.parametrize("model_type", tiny_models.buildable())
def test_every_family_is_cut_or_refused_at_once(model_type: str, tmp_path: Path) -> None:
    path = support.saved(model_type, tmp_path)
    fields = {"drop_ratio": 0.5, "refit": False, "criterion": "weight_norm"}
    for opened in (True, False):
        out = tmp_path / f"out{opened}"
        for shared in (False, True):
            model = open_moe(path) if opened else support.load(path)
            recipe = ExpertWidthModifier(
                **fields, shared_experts=shared, report_path=str(tmp_path / "plan.json")
            )
            try:
                support.trim(model, recipe, no_data=True, output_dir=str(out))
            except ValueError as error:
                refused = str(error)
                reset_session()
                assert not out.exists()
                if "Set shared_experts: true" in refused:
                    continue
                assert model_type in REFUSED and REFUSED[model_type] in refused
            break
        else:
            raise AssertionError(refused)
        if not out.exists():
            continue
        check_checkpoint(out).raise_if_errors()
        report = json.loads((tmp_path / "plan.json").read_text())
        expected = support.logits(reference(path, report))
        torch.testing.assert_close(support.logits(support.load(out)), expected, atol=1e-4, rtol=1e-4)


# One model

SENSITIVITY = {"drop_ratio": 0.25, "scope": "sensitivity"}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.saved("mixtral", tmp_path_factory.mktemp("width"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def test_a_look_at_the_width_leaves_a_loaded_model_alone(mixtral: Path) -> None:
    model = support.load(mixtral)
    assert {width_of(model, moe) for moe in find_topology(model).moe_layers.values()} == {64}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_opened_and_loaded_models_and_plans_give_the_same(mixtral: Path, tmp_path: Path) -> None:
    plan, ids = tmp_path / "plan.json", support.token_ids(64)
    for name, model, fields in (
        ("loaded", support.load(mixtral), {"width": 40, "report_path": str(plan)}),
        ("opened", open_moe(mixtral), {"width": 40}),
        ("again", open_moe(mixtral), {"plan_path": str(plan)}),
    ):
        support.trim(model, ExpertWidthModifier(**fields), ids=ids, output_dir=str(tmp_path / name))
    expected = weights(tmp_path / "loaded")
    assert any(tensor.shape[-1] == 40 for tensor in expected.values())
    for name in ("opened", "again"):
        torch.testing.assert_close(weights(tmp_path / name), expected, atol=1e-5, rtol=1e-4)


def test_a_refit_is_closer_to_the_model_on_other_text() -> None:
    """On trained weights, whose channels go together."""
    data = calibration_dataset(AutoTokenizer.from_pretrained(DEMO_MODEL), 32)
    ids = torch.tensor(heldout_rows(AutoTokenizer.from_pretrained(DEMO_MODEL))[:8])
    expected = support.logits(support.load(DEMO_MODEL), ids)
    errors = {}
    for refit in (False, True):
        modifier = ExpertWidthModifier(drop_ratio=0.5, refit=refit)
        model = oneshot(
            model=open_moe(DEMO_MODEL),
            recipe=modifier,
            dataset=data,
            num_calibration_samples=32,
            max_seq_length=256,
        )
        (report,) = model._trim_history
        assert any(report.refitted.values()) == refit
        assert report.lost.keys() == (set(range(8)) if refit else set())
        errors[refit] = float((support.logits(model, ids) - expected).square().mean())
    assert errors[True] < 0.95 * errors[False], errors


def test_statistics_are_those_of_plain_hooks(mixtral: Path) -> None:
    """Padding is left out; saliency is recomputed from transformers' own modules."""
    model = support.load(mixtral)
    batches = support.padded_batches()
    block = model.model.layers[1]
    experts = block.mlp.experts
    power = torch.zeros(experts.num_experts, experts.down_proj.shape[-1], dtype=torch.float64)

    def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hidden, index, gates = args
        keep = mask.flatten()
        for token in keep.nonzero().flatten().tolist():
            for expert, gate in zip(index[token].tolist(), gates[token].tolist(), strict=True):
                a, b = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                power[expert] += (gate * torch.nn.functional.silu(a) * b).double().square()

    handle = experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            model(**batch)
    handle.remove()
    linear = open_moe(mixtral)
    session = TrimSession.begin(linear)
    found: list[ChannelSums] = []
    observer = RoutedChannels(linear, session.topology.blocks[1], False, found.extend)
    observe_batches(linear, [observer], batches, "Test")
    torch.testing.assert_close(torch.stack([one.power for one in found]), power, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of drop_ratio, width, plan_path; got none"),
        ({"drop_ratio": 0.5, "width": 32}, "got drop_ratio and width"),
        ({"drop_ratio": 1.0}, "drop_ratio=1.0 must lie between 0 and 1"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"width": 64}, "width=64 must be under 64, the present width"),
        ({"width": 40, "multiple_of": 16}, "a multiple of multiple_of=16"),
        (
            {"drop_ratio": 0.1, "multiple_of": 32},
            "no smaller multiple of 32: set multiple_of .* drop_ratio to 0.5",
        ),
        ({"drop_ratio": 0.5, "shared_experts": True}, "'mixtral' has no shared experts that share"),
        (SENSITIVITY | {"drop_ratio": None, "width": 6}, "width=6 must be under 64, .* at least 8, the step"),
        (
            SENSITIVITY | {"drop_ratio": 0.1, "multiple_of": 32},
            "drop_ratio=0.1: 6.4 of 64 channels in 4 layers are too few .*multiple of 32: cut more, or set",
        ),
    ],
)
def test_bad_fields_are_refused(mixtral: Path, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        support.trim(open_moe(mixtral), ExpertWidthModifier(**fields))


def test_the_widths_are_the_best_by_what_was_measured(mixtral: Path, tmp_path: Path) -> None:
    modifier = ExpertWidthModifier(**SENSITIVITY, report_path=str(tmp_path / "plan.json"))
    size = forecast(mixtral, Recipe.from_modifiers([modifier]))[-1].nbytes
    out = tmp_path / "out"
    support.trim(open_moe(mixtral), modifier, output_dir=str(out))
    found = WidthReport.load(tmp_path / "plan.json")
    # A quarter of 64 channels in each of 4 layers, in steps of 8.
    gone = {layer: 64 - found.widths.get(layer, (64, 64))[1] for layer in range(4)}
    assert [[channels for channels, _ in points] for points in found.curves.nats.values()] == [
        [0, 8, 16, 32, 48]
    ] * 4
    steps = range(0, 49, 8)
    damages = {layer: damage_curve(dict(points[1:]), steps) for layer, points in found.curves.nats.items()}
    possible = (choice for choice in itertools.product(steps, repeat=4) if sum(choice) == 64)
    best = min(possible, key=lambda choice: sum(damages[layer][n] for layer, n in enumerate(choice)))
    assert gone == dict(enumerate(best)) and len(set(best)) > 1
    assert found.curves.predicted == pytest.approx(sum(damages[layer][n] for layer, n in enumerate(best)))
    # Channels were measured on some of the tokens, chosen and fitted on all.
    assert found.curves.tokens < found.calibration["tokens"] == 8 * 24
    assert any(found.refitted.values())

    check_checkpoint(out).raise_if_errors()
    widths = [block.mlp.experts.down_proj.shape[-1] for block in support.load(out).model.layers]
    assert widths == [64 - n for n in best]
    assert size == sum(tensor.nbytes for tensor in weights(out).values())

    # Without the fit the checkpoint is the model without what the report says.
    reset_session()
    plain = ExpertWidthModifier(**SENSITIVITY, refit=False, report_path=str(tmp_path / "plain.json"))
    support.trim(support.load(mixtral), plain, output_dir=str(tmp_path / "plain"))
    report = json.loads((tmp_path / "plain.json").read_text())
    assert report["curves"]["nats"] == {
        str(layer): [[count, pytest.approx(nats, abs=1e-6)] for count, nats in points]
        for layer, points in found.curves.nats.items()
    }
    torch.testing.assert_close(
        support.logits(support.load(tmp_path / "plain")),
        support.logits(reference(mixtral, report)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_mean_width_with_protected_and_shared_experts(tmp_path: Path) -> None:
    path = support.saved("deepseek_v3", tmp_path)
    modifier = ExpertWidthModifier(
        width=40,
        scope="sensitivity",
        criterion="weight_norm",
        refit=False,
        shared_experts=True,
        protect=[2],
        report_path=str(tmp_path / "plan.json"),
    )
    support.trim(open_moe(path), modifier, output_dir=str(tmp_path / "out"))
    check_checkpoint(tmp_path / "out").raise_if_errors()
    report = json.loads((tmp_path / "plan.json").read_text())
    layers = set(find_topology(support.load(path)).moe_layers) - {2}
    assert {int(layer) for layer in report["curves"]["nats"]} == layers and "2" not in report["kept"]
    assert sum(old - new for old, new in report["widths"].values()) == 24 * len(layers)
    assert report["calibration"]["tokens"] == report["curves"]["tokens"]
    torch.testing.assert_close(
        support.logits(support.load(tmp_path / "out")),
        support.logits(reference(path, report)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_layers_of_some_families_must_be_alike(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"same width in every layer of 'axk2': .*Use scope='layer'"):
        support.trim(open_moe(support.saved("axk2", tmp_path)), ExpertWidthModifier(**SENSITIVITY))


def test_shared_experts_are_cut_along_or_the_cut_is_refused(tmp_path: Path) -> None:
    """The field that says how wide experts are says it of shared ones as well."""
    path = support.saved("deepseek_v3", tmp_path)
    with pytest.raises(ValueError, match=r"moe_intermediate_size in its config .* Set shared_experts: true"):
        support.trim(open_moe(path), ExpertWidthModifier(width=40))
    reset_session()
    support.trim(
        open_moe(path), ExpertWidthModifier(width=40, shared_experts=True), output_dir=str(tmp_path / "out")
    )
    check_checkpoint(tmp_path / "out").raise_if_errors()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["moe_intermediate_size"] == 40
    assert torch.isfinite(support.logits(support.load(tmp_path / "out"))).all()


def test_the_size_is_known_beforehand(mixtral: Path, tmp_path: Path) -> None:
    modifier = ExpertWidthModifier(drop_ratio=0.25)
    steps = forecast(mixtral, Recipe.from_modifiers([modifier]))
    support.trim(open_moe(mixtral), modifier, output_dir=str(tmp_path / "out"))
    assert steps[-1].nbytes == sum(tensor.nbytes for tensor in weights(tmp_path / "out").values())
    assert "16 of 64 channels" in steps[-1].step


def test_later_changes_to_cut_experts_are_written(tmp_path: Path) -> None:
    """Fused, transposed and interleaved on disk: cut, then pruned, so that all of its parts have new values."""
    path = support.saved("gpt_oss", tmp_path)
    recipe = [
        ExpertWidthModifier(width=32, multiple_of=32),
        SparseGPTModifier(sparsity=0.5, targets=[r"re:.*experts\.\d+\..*_proj$"], block_size=32),
    ]
    model = support.trim(open_moe(path), recipe, output_dir=str(tmp_path / "out"))
    torch.testing.assert_close(
        support.logits(support.load(tmp_path / "out")), support.logits(model), atol=1e-4, rtol=1e-4
    )


def test_layers_may_differ(mixtral: Path, tmp_path: Path) -> None:
    """Protected blocks keep their width; a block drop in the same recipe renumbers what the config says."""
    plan = str(tmp_path / "plan.json")
    fields = {"width": 32, "criterion": "weight_norm", "refit": False, "protect": [1]}
    for name, model in (("opened", open_moe(mixtral)), ("loaded", support.load(mixtral))):
        recipe = [ExpertWidthModifier(**fields, report_path=plan), BlockDropModifier(blocks=[0])]
        support.trim(model, recipe, output_dir=str(tmp_path / name), no_data=True)
        check_checkpoint(tmp_path / name).raise_if_errors()
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["intermediate_size"] == 64
        assert config["per_layer_config"] == {"1": {"intermediate_size": 32}, "2": {"intermediate_size": 32}}
        expected = reference(mixtral, json.loads(Path(plan).read_text()))
        del expected.model.layers[0]
        for index, layer in enumerate(expected.model.layers):
            layer.self_attn.layer_idx = index
        torch.testing.assert_close(
            support.logits(support.load(tmp_path / name)), support.logits(expected), atol=1e-5, rtol=1e-5
        )
    (step,) = forecast(mixtral, Recipe.from_modifiers([ExpertWidthModifier(**fields)]))[1:]
    support.trim(
        open_moe(mixtral), ExpertWidthModifier(**fields), output_dir=str(tmp_path / "one"), no_data=True
    )
    assert step.nbytes == sum(tensor.nbytes for tensor in weights(tmp_path / "one").values())
