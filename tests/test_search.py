"""What LayerDrop and BlockDrop choose in a recipe, against a search on physically shortened stock models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import support
import tiny_models
import torch
from test_profile import mean_cosine, observe
from transformers import PreTrainedModel

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier

BATCHES = [
    {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in support.token_ids()
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.saved("mixtral", tmp_path_factory.mktemp("models"), num_layers=6)


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return tiny_models.build("mixtral", num_layers=6)


def report_of(path: Path, recipe, tmp_path: Path) -> dict:
    recipe.report_path = str(tmp_path / "report.json")
    support.trim(support.load(path), recipe)
    return json.loads(Path(recipe.report_path).read_text())


def shortened(stock: PreTrainedModel, dropped: list[int], part: str) -> tuple[PreTrainedModel, list[int]]:
    """The model without some blocks, or with MoE layers that give zero, and the blocks that are left."""
    model = copy.deepcopy(stock)
    if part == "layer":
        for index in dropped:
            model.model.layers[index].mlp.experts.down_proj.data.zero_()
        return model, [index for index in range(len(stock.model.layers)) if index not in dropped]
    left = [index for index in range(len(stock.model.layers)) if index not in dropped]
    model.model.layers = torch.nn.ModuleList([model.model.layers[index] for index in left])
    return model, left


def cosines(stock: PreTrainedModel, dropped: list[int], part: str) -> dict[int, float]:
    model, left = shortened(stock, dropped, part)
    seen = observe(model, "mixtral", BATCHES)
    if part == "layer":
        return {index: mean_cosine(seen.layers[index]) for index in left}
    return {index: mean_cosine(pairs) for index, pairs in zip(left, seen.blocks, strict=True)}


@torch.no_grad()
def divergences(stock: PreTrainedModel, dropped: list[int], part: str) -> dict[int, float]:
    intact, left = shortened(stock, dropped, part)
    before = [intact(**batch, use_cache=False).logits.double().log_softmax(-1) for batch in BATCHES]
    found = {}
    for index in left:
        without, _ = shortened(stock, [*dropped, index], part)
        total = 0.0
        for batch, p in zip(BATCHES, before, strict=True):
            q = without(**batch, use_cache=False).logits.double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean())
        found[index] = total / len(BATCHES)
    return found


@pytest.mark.parametrize("part", ["layer", "block"])
@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_one_shot_and_greedy(
    part: str, metric: str, path: Path, stock: PreTrainedModel, tmp_path: Path
) -> None:
    modifier = LayerDropModifier if part == "layer" else BlockDropModifier
    score, best = (cosines, max) if metric == "cosine" else (divergences, min)
    once = score(stock, [], part)
    one_shot = report_of(path, modifier(num_drop=3, metric=metric, protect=[0]), tmp_path)
    assert {int(i): s for i, s in one_shot["scores"].items()} == pytest.approx(once, abs=1e-4)
    free = [index for index in once if index != 0]
    assert one_shot["dropped"] == sorted(sorted(free, key=once.get, reverse=best is max)[:3])

    dropped: list[int] = []
    for _ in range(3):
        scores = score(stock, dropped, part)
        dropped.append(best((index for index in scores if index != 0), key=scores.get))
    greedy = report_of(path, modifier(num_drop=3, metric=metric, protect=[0], search="greedy"), tmp_path)
    assert greedy["dropped"] == sorted(dropped)
    assert greedy["kept"] == [index for index in range(6) if index not in dropped]


@pytest.mark.parametrize("search", ["one_shot", "greedy"])
@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_threshold(metric: str, search: str, path: Path, stock: PreTrainedModel, tmp_path: Path) -> None:
    score = cosines if metric == "cosine" else divergences
    sign = -1 if metric == "cosine" else 1
    values = sorted(sign * value for value in score(stock, [], "block").values())
    threshold = sign * (values[1] + values[2]) / 2
    dropped: list[int] = []
    while True:
        scores = score(stock, dropped, "block")
        beyond = sorted(
            (i for i in scores if sign * scores[i] < sign * threshold), key=lambda i: sign * scores[i]
        )
        if search == "one_shot":
            dropped = sorted(beyond)
            break
        if not beyond:
            break
        dropped.append(beyond[0])
    report = report_of(path, BlockDropModifier(threshold=threshold, metric=metric, search=search), tmp_path)
    assert report["dropped"] == sorted(dropped) and dropped


@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_consecutive(metric: str, path: Path, stock: PreTrainedModel, tmp_path: Path) -> None:
    seen = observe(stock, "mixtral", BATCHES)
    scores = {}
    for first in range(5):
        if metric == "cosine":
            pairs = zip(seen.blocks[first], seen.blocks[first + 1], strict=True)
            scores[first] = -mean_cosine([(before[0], after[1]) for before, after in pairs])
        else:
            without, _ = shortened(stock, [first, first + 1], "block")
            with torch.no_grad():
                p = torch.cat([stock(**batch).logits for batch in BATCHES]).double().log_softmax(-1)
                q = torch.cat([without(**batch).logits for batch in BATCHES]).double().log_softmax(-1)
            scores[first] = float((p.exp() * (p - q)).sum(-1).mean())
    first = min(scores, key=scores.get)
    report = report_of(path, BlockDropModifier(num_drop=2, metric=metric, pattern="consecutive"), tmp_path)
    assert report["dropped"] == [first, first + 1]


# Whoever asks for the sequential pipeline gets upstream's own two passes on top, for modifiers that want them.
@pytest.mark.parametrize(("pipeline", "expected"), [("independent", 1), ("sequential", 3)])
def test_three_drops_in_a_row_take_one_pass(pipeline: str, expected: int, path: Path) -> None:
    model = support.load(path)
    passes = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_args: passes.append(1))
    recipe = [
        LayerDropModifier(num_drop=1),
        BlockDropModifier(num_drop=2, pattern="consecutive"),
        ExpertDropModifier(num_drop=2, criterion="reap"),
    ]
    support.trim(model, recipe, pipeline=pipeline)
    assert len(passes) == expected * len(support.token_ids())


def test_random_and_last_need_no_data(path: Path, tmp_path: Path) -> None:
    for metric in ("random", "last"):
        recipe = LayerDropModifier(
            num_drop=2, metric=metric, seed=7, report_path=str(tmp_path / f"{metric}.json")
        )
        support.trim(support.load(path), recipe, no_data=True)
    assert json.loads((tmp_path / "last.json").read_text())["dropped"] == [4, 5]
    again = LayerDropModifier(num_drop=2, metric="random", seed=7, report_path=str(tmp_path / "again.json"))
    support.trim(support.load(path), again, no_data=True)
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("random", "again"))
    assert first["dropped"] == second["dropped"] and first["scores"] == second["scores"]
