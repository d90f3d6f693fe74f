"""Every recipe in recipes/ runs to the end on a tiny model of its family, and the result is what it says."""

import re
from pathlib import Path

import pytest
import support
from safetensors import safe_open

from llmcompressor_moe.compression import CompressionSummary, compress
from llmcompressor_moe.demo import DEMO_MODEL
from llmcompressor_moe.forecast import Step, forecast
from llmcompressor_moe.inspection import inspect_model
from llmcompressor_moe.recipe_file import read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"

# Recipes pack in groups of 128.
WIDE = {"moe_intermediate_size": 128, "hidden_size": 128, "head_dim": 64}

# recipe -> (family, how to build it, experts per MoE layer that must be left)
CASES = {
    "mixtral-8x7b-layer-drop": ("mixtral", {"num_layers": 10}, [8] * 2),
    "mixtral-8x7b-block-drop": ("mixtral", {"num_layers": 7}, [8] * 2),
    "mixtral-8x7b-expert-drop": ("mixtral", {}, [6] * 4),
    "mixtral-8x7b-half-the-experts": ("mixtral", {}, [4] * 4),
    "deepseek-layer-drop": ("deepseek", {"num_layers": 6}, [8]),
    "deepseek-block-drop": ("deepseek", {"num_layers": 7}, None),
    "deepseek-expert-drop": ("deepseek", {"num_experts": 64}, [48] * 3),
    "reap": ("olmoe", {}, [4] * 4),
    "combined-w4a16": ("qwen3_moe", {"num_layers": 8, **WIDE}, [6] * 7),
    "mixtral-8x7b-trim-and-slim": (
        "mixtral",
        {"num_layers": 10, "hidden_size": 128, "intermediate_size": 128, "head_dim": 64},
        [8] * 2,
    ),
    "qwen3-30b-a3b-trim-and-slim": ("qwen3_moe", {"num_experts": 56, **WIDE}, [8] * 4),
    "deepseek-v2-lite-trim-and-slim": (
        "deepseek_v2",
        {"num_layers": 8, "topk_method": "greedy", **WIDE},
        [8] * 3,
    ),
    "olmoe-1b-7b-trim-and-slim": (
        "olmoe",
        {"num_experts": 24, "hidden_size": 128, "intermediate_size": 128},
        [8] * 2,
    ),
    "gpt-oss-20b-trim": ("gpt_oss", {"num_layers": 6, "num_experts": 16}, [8] * 2),
}


def apply(recipe: Path, model: Path, output: Path, dataset: str | Path) -> CompressionSummary:
    return compress(model, recipe, dataset, output, num_samples=4, sequence_length=16)


def for_tiny_models(name: str, directory: Path) -> Path:
    """The recipe; a budget of gigabytes is replaced by one in bits, which does not depend on the model."""
    path = directory / f"{name}.yaml"
    path.write_text(re.sub("target_size: .*", "target_bits: 5.5", (RECIPES / path.name).read_text()))
    return path


def text(directory: Path) -> Path:
    path = directory / "text.txt"
    path.write_text("\n\n".join(" ".join(f"t{3 + (i * d) % 100}" for i in range(40)) for d in range(1, 5)))
    return path


def test_every_recipe_is_tried():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*CASES, "demo"}


@pytest.mark.parametrize("name", CASES)
def test_recipe(name, tmp_path):
    family, options, left = CASES[name]
    model = support.saved(family, tmp_path, **options)
    recipe = for_tiny_models(name, tmp_path)
    summary = apply(recipe, model, tmp_path / "out", text(tmp_path))
    assert summary.check.ok
    assert summary.parameters_after < summary.parameters_before
    if left is not None:
        assert [layer.experts for layer in inspect_model(tmp_path / "out").moe_layers] == left
    if name == "combined-w4a16":
        assert_experts_and_nothing_else_is_packed(tmp_path / "out", 7 * 6)
    else:
        assert_forecast_was_right(forecast(model, read_recipe(recipe))[-1], tmp_path / "out")


def assert_forecast_was_right(step: Step, directory: Path) -> None:
    """Bytes of all tensors as foretold; within a budget at most those, and not far under."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        nbytes = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert step.parameters == inspect_model(directory).parameters
    if step.at_most:
        assert 0.9 * step.nbytes < nbytes <= step.nbytes * 1.001
    else:
        assert nbytes == step.nbytes


def assert_experts_and_nothing_else_is_packed(directory: Path, experts: int) -> None:
    with safe_open(directory / "model.safetensors", "pt") as file:
        names = list(file.keys())
    packed = {name for name in names if name.endswith(".weight_packed")}
    plain = {name for name in names if name.endswith(".weight")}
    assert len(packed) == 3 * experts
    assert all(".experts." in name for name in packed)
    assert "lm_head.weight" in plain
    assert not any(".experts." in name for name in plain)


def test_demo_recipe_does_all_four(tmp_path):
    summary = apply(RECIPES / "demo.yaml", DEMO_MODEL, tmp_path / "out", "demo")
    assert [report.modifier for report in summary.reports] == [
        "BlockDropModifier",
        "LayerDropModifier",
        "ExpertDropModifier",
    ]
    assert summary.needs_plugin
    assert summary.check.ok
    assert summary.bytes_after < 0.5 * summary.bytes_before
