"""Forecasts of losses: damage by hand, a curve that is known, intervals, what is safe, and the command."""

import itertools
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmcompressor_moe.cli import app
from llmcompressor_moe.evidence import Evidence, LayerEvidence
from llmcompressor_moe.evidence.gather import ModelShape, load_evidence, model_shape
from llmcompressor_moe.outlook import (
    Calibration,
    Damage,
    bundled_calibration,
    coverage,
    first_order_damage,
    outlook,
    predict_loss,
)
from llmcompressor_moe.outlook.calibration import CalibrationError, Observation, fit
from llmcompressor_moe.outlook.report import common_ranges, safe_up_to
from llmcompressor_moe.plan import ExpertRoom
from llmcompressor_moe.quantization.schemes import resolve_schemes
from llmcompressor_moe.quantization.sizes import StoredSize
from llmcompressor_moe.sweep.choice import Drops, require_possible
from llmcompressor_moe.sweep.fitting import fit_schemes
from llmcompressor_moe.sweep.grid import Grid, Row

FACTORS = {"blocks": 1.5, "layers": 2.0, "experts": 1.2, "bits": 0.4}
CURVE = Calibration(factors=FACTORS, exponent=1.1, spread=0.2, freedom=8, models=["made up"], points=20)
SCHEMES = ["W4A16", "W8A16", "UNQUANTIZED"]


def evidence(count: int = 4, experts: int = 8, tokens: int = 1000, **changes: object) -> Evidence:
    """Numbers that a calibration run could have given, all different."""
    numbers = random.Random(0)

    def layer() -> LayerEvidence:
        return LayerEvidence(
            routed_tokens=[tokens] * experts,
            output_power=10.0,
            lost_power=[numbers.uniform(0.5, 1.5) for _ in range(experts)],
            errors={
                name: [numbers.uniform(0.5, 1) * scale for _ in range(experts)] for name, scale in ERRORS
            },
            scores={name: [numbers.random() for _ in range(experts)] for name in ("reap", "frequency")},
        )

    fields = {
        "model_type": "mixtral",
        "blocks": count,
        "top_k": dict.fromkeys(range(count), 2),
        "tokens": tokens * experts // 2,
        "samples": 16,
        "kl_samples": 16,
        "block_similarity": {index: 0.9 + index / 100 for index in range(count)},
        "layer_similarity": {index: 0.9 + index / 100 for index in range(count)},
        "block_divergence": {index: 0.3 - index / 20 for index in range(count)},
        "layer_divergence": {index: 0.2 - index / 25 for index in range(count)},
        "layers": {index: layer() for index in range(count)},
        "stability": {"reap": 0.95, "block similarity": 0.99, "layer similarity": 0.99},
    }
    return Evidence(**{**fields, **changes})


ERRORS = (("W4A16", 0.05), ("W8A16", 0.0005))


def shape(layers: int = 4, experts: int = 8) -> ModelShape:
    size = {"W4A16": 4.125, "W8A16": 8.125, "UNQUANTIZED": 16}
    one = {name: StoredSize(bits=round(bits * 1000), weights=1000) for name, bits in size.items()}
    return ModelShape(
        model_type="mixtral",
        blocks=layers,
        rooms={index: ExpertRoom(experts, 2) for index in range(layers)},
        sizes={index: [one] * experts for index in range(layers)},
    )


# Damage


def test_damage_by_hand():
    """Two MoE layers with two experts each, every number written down."""
    layer = LayerEvidence(
        routed_tokens=[5, 5],
        output_power=4.0,
        lost_power=[1.0, 3.0],
        errors={"W4A16": [0.02, 0.06]},
        scores={},
    )
    seen = evidence(
        count=2,
        experts=2,
        block_divergence={0: 0.5, 1: 0.7},
        layer_divergence={0: 0.2, 1: 0.4},
        layers={0: layer, 1: layer},
    )

    def damage(drops: Drops, schemes: dict[int, str] | None = None) -> Damage:
        return first_order_damage(seen, drops, schemes or {})

    assert damage(Drops()) == Damage()
    assert damage(Drops(blocks=[1])) == Damage(blocks=0.7)
    assert damage(Drops(layers=[0, 1])).layers == pytest.approx(0.6)
    assert damage(Drops(experts={0: [0], 1: [1]})).experts == pytest.approx(0.2 * 1 / 4 + 0.4 * 3 / 4)
    assert damage(Drops(), {0: "W4A16", 1: "UNQUANTIZED"}).bits == pytest.approx(0.2 * 0.08 / 4)
    together = damage(Drops(blocks=[0], experts={1: [0]}), {1: "W4A16"})
    assert together.blocks == 0.5
    assert together.experts == pytest.approx(0.4 * 1 / 4)
    assert together.bits == pytest.approx(0.4 * 0.06 / 4), "the expert that is gone is not rounded"


def test_nothing_counts_twice_and_no_layer_costs_more_than_itself():
    seen = evidence()
    block = first_order_damage(seen, Drops(blocks=[1]), {})
    assert first_order_damage(seen, Drops(blocks=[1], layers=[1], experts={1: [0]}), {1: "W4A16"}) == block
    every = first_order_damage(seen, Drops(experts={2: list(range(8))}), {})
    seen.layers[2].lost_power = [100.0] * 8
    assert first_order_damage(seen, Drops(experts={2: [0]}), {}).experts == seen.layer_divergence[2]
    assert every.experts <= seen.layer_divergence[2]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_more_is_never_less(data):
    """Whatever is dropped already, one more expert costs no less; nor does an MoE layer instead of its experts or,
    where blocks cost more than their MoE layers, a block instead of its layer.
    """
    seen = evidence()
    layers = data.draw(st.lists(st.integers(0, 3), unique=True))
    experts = data.draw(st.dictionaries(st.integers(0, 3), st.lists(st.integers(0, 7), unique=True)))
    chosen, expert = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 7))
    even = CURVE.model_copy(update={"factors": dict.fromkeys(FACTORS, 1.0)})

    def loss(**drops: object) -> float:
        return even.loss(first_order_damage(seen, Drops(**drops), {}))

    base = loss(layers=layers, experts=experts)
    more = {**experts, chosen: sorted({*experts.get(chosen, ()), expert})}
    assert loss(layers=layers, experts=more) >= base - 1e-12
    assert loss(layers=[*layers, chosen], experts=experts) >= base - 1e-12
    assert loss(blocks=[chosen], layers=layers, experts=experts) >= base - 1e-12


def test_fewer_bits_cost_more():
    by_scheme = {
        name: first_order_damage(evidence(), Drops(), dict.fromkeys(range(4), name)).bits for name in SCHEMES
    }
    assert by_scheme["W4A16"] > by_scheme["W8A16"] > by_scheme["UNQUANTIZED"] == 0


@pytest.mark.parametrize(
    "drops, schemes, said",
    [
        (Drops(blocks=[7]), {}, r"blocks=\[7\]: the evidence has blocks \[0, 1, 2, 3\]"),
        (Drops(layers=[4]), {}, r"layers=\[4\]: the evidence has MoE layers"),
        (Drops(experts={0: [8]}), {}, r"experts=\[8\] of block 0: it has experts 0 to 7"),
        (Drops(), {0: "W3A16"}, r"does not know 'W3A16'; it has \['W4A16', 'W8A16'\]"),
    ],
)
def test_damage_of_what_is_not_there(drops, schemes, said):
    with pytest.raises(ValueError, match=said):
        first_order_damage(evidence(), drops, schemes)


# Curve


def made_up(models: int = 3, spread: float = 0.0, seed: int = 0, between: float = 0.0) -> list[Observation]:
    """Points of every kind and of all together, on a known curve."""
    numbers = random.Random(seed)
    found = []
    for number in range(models):
        shift = numbers.gauss(0, between)
        for kind, amount in itertools.product([*FACTORS, "mixed"], (0.01, 0.05, 0.2, 0.8)):
            kinds = FACTORS if kind == "mixed" else (kind,)
            damage = Damage(**{name: amount * numbers.uniform(0.5, 1.5) for name in kinds})
            loss = CURVE.loss(damage) * math.exp(shift + numbers.gauss(0, spread))
            found.append(Observation(f"model {number}", damage, loss))
    return found


@pytest.mark.parametrize("models", [1, 3])
def test_the_fit_finds_the_curve_behind_points(models):
    found = fit(made_up(models))
    assert found.factors == pytest.approx(FACTORS, rel=1e-4)
    assert found.exponent == pytest.approx(1.1, rel=1e-4)
    assert found.spread < 1e-4
    assert found.points == 20 * models


def test_the_fit_finds_the_curve_among_scattered_points():
    found = fit(made_up(models=10, spread=0.15))
    assert found.factors == pytest.approx(FACTORS, rel=0.15)
    assert found.exponent == pytest.approx(1.1, rel=0.05)
    assert found.spread == pytest.approx(0.15, rel=0.25)


def test_the_spread_holds_how_models_differ():
    alike, differing = fit(made_up(models=6, spread=0.1)), fit(made_up(models=6, spread=0.1, between=0.5))
    assert differing.spread > 2 * alike.spread


def test_points_in_the_noise_are_left_out():
    noisy = [Observation("model 0", Damage(bits=1e-5), -1e-4, 1e-3), Observation("model 0", Damage(), 0.0)]
    assert fit([*made_up(), *noisy]) == fit(made_up())


def test_too_few_observations():
    with pytest.raises(CalibrationError, match=r"'bits'"):
        fit([one for one in made_up() if not one.damage.bits])
    with pytest.raises(CalibrationError, match="at least 6"):
        fit(made_up(1)[::5])


def test_intervals_hold_what_they_promise():
    calibration = fit(made_up(models=8, spread=0.2))
    fresh = made_up(models=20, spread=0.2, seed=1)
    inside = [
        (loss := predict_loss(one.damage, calibration)).nll_low <= one.nll_increase <= loss.nll_high
        for one in fresh
    ]
    assert sum(inside) / len(inside) == pytest.approx(0.9, abs=0.05)


def test_intervals_widen_with_the_spread_and_with_confidence():
    damage = Damage(layers=0.1)

    def width(spread: float, freedom: int = 8, confidence: float = 0.9) -> float:
        curve = CURVE.model_copy(update={"spread": spread, "freedom": freedom})
        loss = predict_loss(damage, curve, confidence)
        assert loss.nll_low <= loss.nll_increase <= loss.nll_high
        assert loss.perplexity_factor == pytest.approx(math.exp(loss.nll_increase))
        return loss.nll_high / loss.nll_low

    assert width(0) == 1 < width(0.1) < width(0.2)
    assert width(0.1, freedom=3) > width(0.1, freedom=30)
    assert width(0.1, confidence=0.5) < width(0.1)
    with pytest.raises(ValueError, match=r"confidence=1\.0"):
        width(0.1, confidence=1.0)


def test_no_damage_no_loss():
    loss = predict_loss(Damage(), CURVE)
    assert (loss.nll_low, loss.nll_increase, loss.nll_high, loss.perplexity_high) == (0, 0, 0, 1)


def test_the_bundled_calibration_is_a_rising_curve():
    calibration = bundled_calibration()
    assert calibration.loss(Damage(bits=0.01)) < calibration.loss(Damage(bits=0.02))
    assert "benchmarks/forecast.py" in calibration.made_by


# What is safe


def ranged() -> Grid:
    return Grid(points=common_ranges(shape()), schemes=SCHEMES)


def test_ranges_are_possible_and_cover_every_kind():
    assert common_ranges(shape()) == [
        Row(blocks=[1, 2]),
        Row(layers=[1, 2]),
        Row(experts=[1, 2, 3, 4, 5, 6]),
        Row(bits=[4.13, 6.13, 8.13, 12.07]),
    ]
    assert len(outlook(evidence(), shape(), ranged(), calibration=CURVE).points) == 2 + 2 + 6 + 4


def test_groups_lose_the_same_number_each():
    grouped = shape()
    grouped.rooms.update({index: ExpertRoom(8, 4, 2) for index in range(4)})
    assert common_ranges(grouped)[2] == Row(experts=[2, 4])


def test_safe_is_monotone_in_what_is_allowed_and_keeps_it():
    previous = None
    for allowed in (0, 0.001, 0.01, 0.05, 0.1, 0.3, 1, 3, 30, 1e6):
        found = outlook(evidence(), shape(), ranged(), allowed, CURVE)
        safe = found.safe
        for one in found.points:
            point = one.point
            if (
                0 < point.blocks <= safe.blocks
                or 0 < point.layers <= safe.layers
                or 0 < point.experts <= safe.experts
                or (point.bits and safe.bits and point.bits >= safe.bits)
            ):
                assert one.loss.perplexity_high <= (1 + allowed) * (1 + 1e-12)
        if previous is not None:
            assert safe.blocks >= previous.blocks
            assert safe.layers >= previous.layers
            assert safe.experts >= previous.experts
            assert (safe.bits or 99) <= (previous.bits or 99)
        previous = safe
    assert (previous.blocks, previous.layers, previous.experts, previous.bits) == (2, 2, 6, 4.13)
    assert outlook(evidence(), shape(), ranged(), 0, CURVE).safe.model_dump() == {
        "blocks": 0,
        "layers": 0,
        "experts": 0,
        "bits": None,
    }


def test_a_gap_is_not_jumped():
    """A harsher point that looks better than a milder one does not make the milder one safe."""
    points = [one for one in outlook(evidence(), shape(), ranged(), 0.05, CURVE).points if one.point.experts]
    mild = predict_loss(Damage(experts=1e-6), CURVE)
    points[2] = points[2].model_copy(update={"loss": mild})
    assert safe_up_to(points, 0.001).experts == 0


def test_points_of_several_kinds_are_forecast_but_say_nothing_about_one():
    row = Row(layers=[1], experts=[1], bits=[6.5])
    found = outlook(evidence(), shape(), Grid(points=[row], schemes=SCHEMES), 1e6, CURVE)
    (one,) = found.points
    assert one.damage.kinds == ("layers", "experts", "bits")
    assert found.safe.layers == found.safe.experts == 0
    assert len(one.schemes) == 3


@pytest.mark.parametrize("allowed", [-0.1, math.inf, math.nan])
def test_an_impossible_allowance(allowed):
    with pytest.raises(ValueError, match="allowed_increase="):
        outlook(evidence(), shape(), ranged(), allowed, CURVE)


# Coverage


def counts(*numbers: int, **changes: object) -> Evidence:
    seen = evidence(count=1, experts=len(numbers), **changes)
    seen.layers[0].routed_tokens = list(numbers)
    return seen


@pytest.mark.parametrize(
    "seen, verdict, said",
    [
        (counts(*[100] * 200), "good", []),
        (counts(*[100] * 199, 15), "thin", ["1 of 200 experts saw fewer than 16"]),
        (counts(*[100] * 199, 0), "thin", ["1 of 200 experts saw no token"]),
        (counts(*[100] * 189, *[15] * 11), "poor", ["11 of 200 experts saw fewer than 16"]),
        (counts(*[100] * 197, *[0] * 3), "poor", ["3 of 200 experts saw no token"]),
        (counts(*[100] * 8, stability={"reap": 0.4}), "poor", ["correlation of 0.40"]),
        (counts(*[100] * 8, stability={"reap": 0.7}), "thin", ["correlation of 0.70"]),
        (counts(*[100] * 8, stability={"reap": None, "frequency": 0.1}), "good", []),
        (counts(*[100] * 8, kl_samples=1, tokens=2000), "thin", ["about 500 tokens"]),
    ],
)
def test_verdicts(seen, verdict, said):
    found = coverage(seen)
    assert found.verdict == verdict
    assert len(found.reasons) == len(said)
    assert all(text in reason for text, reason in zip(said, found.reasons, strict=True))


def test_coverage_counts():
    found = coverage(counts(0, 3, 16, 40, 100))
    assert (found.min_tokens, found.median_tokens, found.unseen, found.starved) == (0, 16, 1, 2)
    assert found.starved_share == pytest.approx(0.4)


# What was measured


def test_measured_models_keep_what_forecasts_promised():
    """docs/forecast.json: sweeps against forecasts by a curve that was fitted on other models."""
    found = json.loads((Path(__file__).parent.parent / "docs" / "forecast.json").read_text())
    assert Calibration(**found["calibration"]) == bundled_calibration()
    assert found["left_out"]
    for model in found["models"].values():
        assert len(model["points"]) > 20
        assert model["test"]["spearman"] >= 0.9
        for row in model["test"]["safe"]:
            assert max(row["lost"].values(), default=0) <= row["allowed"]
        assert any(row["lost"] for row in model["test"]["safe"]), "nothing was ever called safe"


# The command


def run(*arguments: object):
    return CliRunner().invoke(app, ["forecast", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return support.saved("mixtral", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(f"t{3 + (i * d) % 100}" for i in range(80)) for d in range(1, 9)))
    return path


@pytest.fixture(scope="module")
def made(model, text, tmp_path_factory) -> Path:
    """A folder with what one calibration run found, and its forecast."""
    folder = tmp_path_factory.mktemp("forecast")
    options = ("--num-samples", 8, "--sequence-length", 16, "--kl-samples", 2, "--group-size", 32)
    written = ("--save-evidence", folder / "evidence.json", "--output", folder / "forecast.json")
    result = run(model, "--dataset", text, *options, *written)
    assert result.exit_code == 0, result.output
    assert "safe, each alone, for 5 % more perplexity at most" in result.output
    assert "calibration data: " in result.output
    return folder


def test_the_command_writes_what_it_found(made, model):
    found = json.loads((made / "forecast.json").read_text())
    assert {"safe", "points", "coverage", "calibration", "allowed_increase"} == set(found)
    assert found["coverage"]["tokens"] == 128
    assert found["coverage"]["verdict"] in ("thin", "poor")
    assert [point["point"]["blocks"] for point in found["points"][:2]] == [1, 2]


def test_the_command_repeats_itself_from_saved_evidence(made, model):
    again = run(model, "--evidence", made / "evidence.json", "--group-size", 32, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads((made / "forecast.json").read_text())


def test_the_command_forecasts_a_grid(made, model, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text("{points: [{layers: 1, experts: [1, 2], bits: 9}], group_size: 32}")
    found = run(model, "--evidence", made / "evidence.json", "--grid", grid, "--json")
    assert found.exit_code == 0, found.output
    points = [one["point"] for one in json.loads(found.stdout)["points"]]
    assert points[-1] == {"blocks": 0, "layers": 1, "experts": 2, "bits": 9.0}


def test_bad_input_is_one_line_and_exit_code_two(made, model, tmp_path, text):
    other = support.saved("qwen2_moe", tmp_path)
    small = support.saved("mixtral", tmp_path, num_layers=2)
    assert small != model
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    broken = tmp_path / "broken.json"
    broken.write_text('{"model_type": "mixtral"}')
    grid = tmp_path / "grid.yaml"
    grid.write_text("points: [{layers: 1}]")
    evidence_file, fitting = made / "evidence.json", ("--group-size", 32)
    for arguments, said in (
        ((model, "--dataset", empty, *fitting), "is empty; give at least one document"),
        (
            (model, "--dataset", text, "--sequence-length", 10_000, *fitting),
            "sequence_length=10000: the model has 256 positions",
        ),
        ((other, "--evidence", evidence_file, *fitting), "tells of another model: model_type is"),
        ((small, "--evidence", evidence_file, *fitting), "tells of another model: blocks is 4"),
        ((model, "--evidence", evidence_file, "--scheme", "W4AFP8"), "quantizes inputs"),
        (
            (model, "--evidence", broken, *fitting),
            "not evidence of a calibration run: blocks: Field required",
        ),
        ((model, "--evidence", tmp_path / "none.json", *fitting), "cannot be read"),
        ((model, "--grid", grid, "--scheme", "W8A16"), "names the schemes"),
        ((model, "--dataset", text, "--output", tmp_path), "is a directory; name a file"),
        ((model, "--dataset", text, "--scheme", "W9A99"), "is not a preset"),
        (
            (model, "--dataset", text, "--scheme", "W4A16"),
            "does not fit the experts of block 0: group size 128 does not divide its 64 inputs; group_size=64",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert said in " ".join(result.output.split()), (arguments, result.output)
    assert "allowed-increase" in run(model, "--allowed-increase", -1).output


@pytest.mark.parametrize(
    ("width", "remark"),
    [
        (48, "W4A16 and W8A16 get groups of 48, which divide the inputs of all experts"),
        (20, "W4A16 and W8A16 are left out: no group size divides the inputs of all experts"),
    ],
)
def test_schemes_that_nobody_asked_for_are_adapted_or_left_out(width, remark, text, tmp_path):
    sizes = {"hidden_size": 96, "intermediate_size": width}
    model = support.saved("mixtral", tmp_path, num_layers=2, num_experts=4, **sizes)
    fast = ("--dataset", text, "--num-samples", 2, "--sequence-length", 16, "--kl-samples", 1)
    written = tmp_path / "forecast.json"
    result = run(model, *fast, "--output", written)
    assert result.exit_code == 0, result.output
    assert remark in " ".join(result.output.split())
    bits = {one["point"]["bits"] for one in json.loads(written.read_text())["points"]} - {None}
    assert bool(bits) == (width == 48)
    # a sweep takes the same; what is asked for stays as it is
    assert fit_schemes(model, Grid(points=[Row()])).grid.group_size == (48 if width == 48 else None)
    for asked in ({"group_size": 96}, {"schemes": ["W4A16"]}):
        with pytest.raises(ValueError, match="group_size=48 does" if width == 48 else "channel-wise scales"):
            fit_schemes(model, Grid(points=[Row()], **asked))


def test_evidence_of_another_model_of_the_same_shape(made, model, tmp_path):
    """One value of one router differs in the weights; shapes and config are the same."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    assert run(other, "--evidence", made / "evidence.json", "--group-size", 32).exit_code == 0
    weights = load_file(other / "model.safetensors")
    router = next(name for name in weights if name.endswith("gate.weight"))
    weights[router][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    result = run(other, "--evidence", made / "evidence.json", "--group-size", 32)
    assert result.exit_code == 2
    assert "tells of another model: the fingerprint of its config and weights" in result.output
    unmarked = json.loads((made / "evidence.json").read_text()) | {"fingerprint": None}
    (tmp_path / "unmarked.json").write_text(json.dumps(unmarked))
    assert run(model, "--evidence", tmp_path / "unmarked.json", "--group-size", 32).exit_code == 2


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("layers", "1", "lost_power"), [1.0], "layers.1: Value error, lost_power has 1 entries"),
        (("layers", "1", "errors", "W4A16"), [1.0], "errors.W4A16 has 1 entries, routed_tokens 8"),
        (("layers", "1", "scores"), {}, "scores are not of the same names in every layer"),
        (("layers", "1", "output_power"), -1, "layers.1.output_power: Input should be greater"),
        (("layers", "1", "routed_tokens"), [-1] * 8, "routed_tokens.0: Input should be greater"),
        (("block_divergence", "1"), math.nan, "block_divergence.1: Input should be a finite number"),
        (("layer_divergence",), {}, "layer_divergence lacks [0, 1, 2, 3]"),
        (("tokens",), -4, "tokens: Input should be greater"),
    ],
)
def test_evidence_that_was_damaged(made, model, tmp_path, keys, value, said):
    written = json.loads((made / "evidence.json").read_text())
    place = written
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "evidence.json").write_text(json.dumps(written))
    result = run(model, "--evidence", tmp_path / "evidence.json", "--group-size", 32)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


def test_what_is_wrong_is_found_before_weights_are_read(made, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("llmcompressor_moe.evidence.gather.open_model", None)
    grid = tmp_path / "grid.yaml"
    grid.write_text("{points: [{experts: 8}], group_size: 32}")
    cut = tmp_path / "cut"
    shutil.copytree(model, cut)
    (cut / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1000])
    lacking = tmp_path / "lacking"
    shutil.copytree(model, lacking)
    weights = load_file(lacking / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "short.txt").write_text("t3 t4 t5 t6")
    evidence_file, fitting = made / "evidence.json", ("--dataset", text, "--group-size", 32)
    both = tmp_path / "both.json"
    for arguments, said in (
        ((model, *fitting, "--dtype", "int8"), "dtype='int8': choose one of auto"),
        ((model, *fitting, "--allowed-increase", "inf"), "allowed_increase=inf: give 0 or more"),
        ((model, "--dataset", text, "--grid", grid), "8 experts per layer dropped: num_drop=8 would leave"),
        ((cut, *fitting), "the tensors end at byte"),
        ((lacking, *fitting), "model.norm.weight: config.json demands it, no file holds it"),
        (
            (model, *fitting, "--dataset", tmp_path / "short.txt", "--sequence-length", 3),
            "at least two are needed",
        ),
        ((model, *fitting, "--output", both, "--save-evidence", both), "are both"),
        ((model, "--evidence", evidence_file, "--save-evidence", both), "leave one of them out"),
        (
            (model, "--evidence", evidence_file, "--output", evidence_file),
            "would replace a file that is read",
        ),
        ((model, *fitting, "--output", model / "config.json"), "would replace a file that is read"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output, result.exception)
        assert said in " ".join(result.output.split()), (arguments, result.output)
    assert not both.exists()


@pytest.mark.parametrize(
    ("dense", "layers", "possible"), [(1, 2, True), (1, 3, False), (0, 2, True), (0, 3, False)]
)
def test_a_point_is_refused_only_if_no_calibration_makes_it_possible(dense, layers, possible):
    """Of three MoE layers, one block goes: possible where a block without one may be that block."""
    whole = shape(3 + dense)
    rooms = {index: room for index, room in whole.rooms.items() if index >= dense}
    sizes = {index: size for index, size in whole.sizes.items() if index >= dense}
    grid = Grid.model_validate({"points": [{"blocks": 1, "layers": layers - (dense == 0)}]})
    if possible:
        require_possible(grid, replace(whole, rooms=rooms, sizes=sizes))
    else:
        with pytest.raises(ValueError, match="no MoE layer would be left"):
            require_possible(grid, replace(whole, rooms=rooms, sizes=sizes))


def test_evidence_with_other_schemes(made, model):
    candidates = resolve_schemes(["W8A16", "W3A16"], 32, "schemes")
    with pytest.raises(ValueError, match=r"does not know the scheme W3A16; it has W4A16"):
        load_evidence(made / "evidence.json", model, candidates)
    other_groups = resolve_schemes(["W4A16"], 16, "schemes")
    with pytest.raises(
        ValueError, match=r"another scheme by the name of W4A16 .*group_size=32; .*group_size=16"
    ):
        load_evidence(made / "evidence.json", model, other_groups)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_the_shape_from_the_config_is_what_the_planner_sees(family, tmp_path):
    from llmcompressor.modeling.moe.linearize import linearize_moe

    from llmcompressor_moe.loading import load_model
    from llmcompressor_moe.quantization.planner import Planner, QuantSettings
    from llmcompressor_moe.surgery.session import TrimSession

    path = support.saved(family, tmp_path)
    candidates = resolve_schemes(SCHEMES, 16, "schemes")
    session = TrimSession.begin(linearize_moe(load_model(path)))
    planned = Planner(
        session,
        QuantSettings(
            candidates=candidates,
            attention=None,
            dense=None,
            target_bits=1.0,
            target_size=None,
            per_expert=False,
            ignore=[],
            sensitivity="output_error",
            sample_tokens=1,
            seed=0,
        ),
    ).sizes()
    found = model_shape(path, candidates)
    assert {
        layer: [{name: (size.bits, size.weights) for name, size in expert.items()} for expert in experts]
        for layer, experts in found.sizes.items()
    } == {
        layer: [{name: (size.bits, size.weights) for name, size in expert.items()} for expert in experts]
        for layer, experts in planned.items()
    }
    assert {index: moe.min_experts for index, moe in session.topology.moe_layers.items()} == {
        index: room.floor for index, room in found.rooms.items()
    }
