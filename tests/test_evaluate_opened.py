"""Evaluation of opened checkpoints: the figures of loaded ones, in memory that does not grow with blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import PreTrainedModel

from llmcompressor_moe import ExpertDropModifier, LayerDropModifier, RouterAwareQuantModifier
from llmcompressor_moe.checkpoint.opened import opened_from
from llmcompressor_moe.evaluation.in_memory import BaseFigures, Measured, measured, recorded_figures
from llmcompressor_moe.evaluation.likelihood import mean_negative_log_likelihood
from llmcompressor_moe.evaluation.text import text_quality
from llmcompressor_moe.loading import load_callable, load_decompressed, open_as_served

LENGTH = 16

RECIPES: dict[str, list[Modifier]] = {
    "trimmed": [LayerDropModifier(layers=[2]), ExpertDropModifier(experts={1: [0, 3]})],
    "rounded": [RouterAwareQuantModifier(schemes=["W4A16", "W8A16"], group_size=32, target_bits=7.0)],
    "dynamic_inputs": [
        QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head", "re:.*gate$"])
    ],
    "static_inputs_and_cache": [
        QuantizationModifier(
            targets="Linear",
            scheme="FP8",
            ignore=["lm_head", "re:.*gate$"],
            kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
        )
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opened")
    base = support.saved("mixtral", folder)
    for name, recipe in RECIPES.items():
        support.trim(support.load(base), recipe, output_dir=str(folder / name))
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    with recorded(load_decompressed(folder / "mixtral")) as figures:
        yield figures


def texts() -> list[str]:
    return [" ".join(f"t{token}" for token in row) for row in support.token_ids(4, 2 * LENGTH + 5).tolist()]


def recorded(model: PreTrainedModel) -> Any:
    return recorded_figures(model, support.tokenizer(), texts(), LENGTH, LENGTH // 2, batch_size=2)


def figures_of(found: Measured) -> dict[str, float]:
    chosen = torch.cat([trace.chosen.float().mean(0) for trace in found.routing.traces.values()])
    return {
        **found.text.model_dump(),
        **found.agreement.model_dump(),
        **{f"share of choices {index}": float(share) for index, share in enumerate(chosen)},
    }


@pytest.mark.parametrize("name", ["mixtral", *RECIPES])
def test_what_is_opened_gives_the_figures_of_what_is_loaded(
    folder: Path, base: BaseFigures, name: str
) -> None:
    served = open_as_served(folder / name)
    assert opened_from(served) is not None
    ours = figures_of(measured(served, base))
    assert ours == pytest.approx(figures_of(measured(load_decompressed(folder / name), base)), rel=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_predictions_are_those_of_the_model_when_it_is_called(folder: Path, name: str) -> None:
    opened, called = open_as_served(folder / name), load_callable(folder / name, device="cpu")
    rows = support.token_ids(4, LENGTH + 1)
    logits = support.logits(called, rows[:, :-1]).double()
    expected = -logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).mean()
    assert mean_negative_log_likelihood(opened, rows) == pytest.approx(float(expected), rel=1e-5)
    assert mean_negative_log_likelihood(called, rows) == pytest.approx(float(expected), rel=1e-5)
    found = text_quality(opened, support.tokenizer(), rows, LENGTH, LENGTH)
    assert found.mean_nll == pytest.approx(float(expected), rel=1e-5)


MEASURE = """
import json, pathlib, sys, threading
from llmcompressor_moe.evaluation.run import EvaluationSettings, evaluate

def anonymous():
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

def peak(path):
    most, over = [anonymous()], threading.Event()
    def watch():
        while not over.wait(0.002):
            most.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    evaluate(path, [path], EvaluationSettings(source=sys.argv[1], length=16, stride=16))
    over.set()
    thread.join()
    return max(most)

print(json.dumps([peak(path) for path in sys.argv[2:]]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 768}
    paths = [
        support.saved("mixtral", tmp_path / str(blocks), num_layers=blocks, **wide) for blocks in (2, 2, 8)
    ]
    block = sum(file.stat().st_size for file in paths[-1].glob("*.safetensors")) / 8
    assert block > 15e6
    (tmp_path / "text.txt").write_text("\n\n".join(texts()))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "text.txt"), *map(str, paths)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # The first run also imports what runs for the first time need.
    _, few, many = json.loads(done.stdout.splitlines()[-1])
    assert many - few < 1.5 * block, (few, many, block)
