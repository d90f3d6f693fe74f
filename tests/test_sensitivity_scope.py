"""Expert Drop that cuts each layer as deep as it costs least."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from pydantic import ValidationError

from llmcompressor_moe import ExpertDropModifier, LayerDropModifier, open_moe
from llmcompressor_moe.counts import damage_curve
from llmcompressor_moe.modifiers.damage_curves import MOST_PASSES, MOST_TOKENS, measured_share
from llmcompressor_moe.profile.splitting import some_samples
from llmcompressor_moe.profile.variants import passes_of
from llmcompressor_moe.report import DropReport


def sensitivity(**fields: Any) -> ExpertDropModifier:
    return ExpertDropModifier(scope="sensitivity", **{"num_drop": 2, "criterion": "reap", **fields})


def report(tmp_path: Path, model_type: str = "mixtral", **fields: Any) -> DropReport:
    path = support.saved(model_type, tmp_path)
    recipe = sensitivity(report_path=str(tmp_path / "report.json"), **fields)
    support.trim(open_moe(path), recipe, output_dir=str(tmp_path / "out"))
    return DropReport.load(tmp_path / "report.json")


def counts(found: DropReport) -> dict[int, int]:
    return {layer: len(found.dropped.get(layer, [])) for layer in found.kept}


def test_the_choice_is_the_best_by_what_was_measured(tmp_path: Path) -> None:
    found = report(tmp_path)
    assert sum(counts(found).values()) == 4 * 2
    damages = {layer: damage_curve(dict(points[1:]), range(7)) for layer, points in found.curves.nats.items()}
    possible = (choice for choice in itertools.product(range(7), repeat=4) if sum(choice) == 8)
    best = min(possible, key=lambda choice: sum(damages[layer][n] for layer, n in enumerate(choice)))
    assert counts(found) == dict(enumerate(best))
    assert found.curves.predicted == pytest.approx(sum(damages[layer][n] for layer, n in enumerate(best)))
    assert [[count for count, _ in points] for points in found.curves.nats.values()] == [[0, 1, 2, 4, 6]] * 4
    for layer, scores in found.scores.items():
        order = sorted(range(8), key=lambda expert: scores[expert])
        assert set(found.dropped.get(layer, [])) == set(order[: counts(found)[layer]])
    # Eight samples of 24 tokens; 4 counts in each of 4 layers take 1 + 4 * 2.5 passes.
    assert (found.curves.samples, found.curves.tokens) == (5, 5 * 24)
    assert found.curves.passes == pytest.approx(5 / 8 * 11) and found.curves.passes <= MOST_PASSES
    assert found.calibration == {"tokens": 8 * 24, "samples": 8}

    # The report is a plan, and the checkpoint says how many experts each layer has.
    model = support.load(tmp_path / "out")
    assert [len(block.mlp.gate.weight) for block in model.model.layers] == [8 - n for n in best]
    again = support.trim(
        support.load(tmp_path / "mixtral"),
        ExpertDropModifier(plan_path=str(tmp_path / "report.json")),
        no_data=True,
    )
    torch.testing.assert_close(support.logits(again), support.logits(model), atol=1e-5, rtol=1e-5)


def test_limits_of_layers_are_honoured(tmp_path: Path) -> None:
    found = report(tmp_path, protect=[1], min_experts=4, round_to=2, num_drop=3)
    chosen = counts(found)
    # Nine experts of three layers, at the next multiple of two.
    assert chosen.pop(1) == 0 and 1 not in found.curves.nats
    assert sum(chosen.values()) == 8 and set(chosen.values()) <= {0, 2, 4}


def test_groups_lose_as_many(tmp_path: Path) -> None:
    found = report(tmp_path, "deepseek_v3")
    assert sum(counts(found).values()) == 2 * len(counts(found))
    for experts in found.dropped.values():
        assert len(set(Counter(expert // 4 for expert in experts).values())) == 1


def test_what_goes_before_is_measured_without(tmp_path: Path) -> None:
    path = support.saved("mixtral", tmp_path)
    reports = [str(tmp_path / f"{name}.json") for name in ("layer", "expert")]
    recipe = [
        LayerDropModifier(layers=[2], report_path=reports[0]),
        # Needs no statistics, and data all the same.
        sensitivity(criterion="weight_norm", report_path=reports[1]),
    ]
    support.trim(support.load(path), recipe)
    found = DropReport.load(reports[1])
    assert set(found.curves.nats) == {0, 1, 3} and sum(counts(found).values()) == 6
    assert found.calibration == {"tokens": found.curves.tokens, "samples": found.curves.samples}


def test_round_to_in_layer_scope(tmp_path: Path) -> None:
    path = support.saved("mixtral", tmp_path)
    model = support.trim(
        support.load(path), ExpertDropModifier(num_drop=3, round_to=2, criterion="weight_norm")
    )
    assert [len(block.mlp.gate.weight) for block in model.model.layers] == [6] * 4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"round_to": 0}, "round_to=0 must be at least 1"),
        (
            {"round_to": 4, "num_drop": None, "experts": {0: [1]}},
            "round_to=4 .*names the experts.*leave it out",
        ),
        ({"round_to": 4, "scope": "global"}, "round_to=4 does not go with scope='global'"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExpertDropModifier(**{"num_drop": 2, "scope": "sensitivity", **fields})


@pytest.mark.parametrize(
    "model_type, recipe, message",
    [
        ("mixtral", sensitivity(num_drop=7), "28 experts are to be dropped in all, but the floors allow 24"),
        (
            "mixtral",
            sensitivity(num_drop=1, round_to=8),
            "round_to=8: at most 4 experts.*drop more, or lower",
        ),
        (
            "mixtral",
            ExpertDropModifier(num_drop=1, round_to=4),
            "round_to=4: layer 0 has 8 experts, needs 2 and is to lose 1 at most",
        ),
        ("deepseek_v3", sensitivity(num_drop=1), "3 experts .*multiple of 2"),
        ("axk2", sensitivity(), "must leave every layer of 'axk2' the same"),
    ],
)
def test_what_cannot_be(model_type: str, recipe: ExpertDropModifier, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        support.trim(open_moe(support.saved(model_type, tmp_path)), recipe.model_copy(deep=True))


def test_no_more_is_measured_than_eight_passes_take() -> None:
    blocks = [*range(48)] * 4
    assert measured_share(blocks, 48, 10_000) * passes_of(blocks, 48) == pytest.approx(MOST_PASSES)
    assert measured_share([40], 48, 10_000) == 1
    assert measured_share([40], 48, 4 * MOST_TOKENS) == 0.25


def test_samples_are_rows_of_batches_whatever_their_order() -> None:
    ids = support.token_ids(6, 8)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "use": 1} for part in ids.split(2)
    ]
    taken = some_samples(batches, 0.5)
    assert (
        [row["input_ids"].shape for row in taken]
        == [(1, 8)] * 3
        == [row["attention_mask"].shape for row in taken]
    )
    again = some_samples(batches[::-1], 0.5)
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(taken, again, strict=True))
    assert len(some_samples(batches, 0.01)) == 1 and some_samples([], 0.5) == []
