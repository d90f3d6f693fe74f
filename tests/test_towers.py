"""Models with vision and audio towers beside an MoE text model: what is meant for the text stays there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
import tiny_models
import torch
from compressed_tensors.utils import match_name, match_named_modules
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from safetensors.torch import load_file
from torch import nn

from llmcompressor_moe import BlockDropModifier, RouterAwareQuantModifier, open_moe
from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.checkpoint.quantized_names import patterns_for
from llmcompressor_moe.compat.llmcompressor.mappings import awq_mappings
from llmcompressor_moe.inspection import inspect_model
from llmcompressor_moe.topology import find_topology, find_towers

TOWERS = {
    "deepseek_ocr2": {"model.vision_tower", "model.multi_modal_projector"},
    "gemma4": {"model.vision_tower", "model.audio_tower", "model.embed_vision", "model.embed_audio"},
    "llama4": {"vision_model", "multi_modal_projector"},
    "llava": {"model.vision_tower", "model.multi_modal_projector"},
    "qwen3_omni_moe_thinker": {"audio_tower", "visual"},
    "qwen3_vl_moe": {"model.visual"},
}
VISION = "vision_model.model.layers.0.self_attn"


@pytest.mark.parametrize("model_type", tiny_models.multimodal())
def test_patterns_stay_in_the_text_model(model_type: str) -> None:
    """In memory, in the files, which put ``model`` last or leave it out, and in vLLM, which does so as well."""
    model = tiny_models.on_meta(model_type)
    topology = find_topology(model)
    towers = find_towers(model, topology)
    assert set(towers) == TOWERS.get(model_type, set(towers)) and towers
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    text = [name for name in linears if name.startswith(f"{topology.stack}.")]
    inside = [name for name in linears if f"{name}.".startswith(tuple(f"{tower}." for tower in towers))]
    assert text and inside and not set(text) & set(inside)
    patterns = patterns_for(text, linears, [topology.stack])
    assert len(patterns) < len(text)
    place = len(topology.stack) - len("layers")
    for stack in (
        topology.stack,
        "model.layers",
        "language_model.model.layers",
        "model.language_model.layers",
    ):
        for name in text:
            moved = f"{stack}{name[place + len('layers') :]}"
            assert any(match_name(moved, pattern) for pattern in patterns)
    for name in inside:
        bare = name.removeprefix("model.")
        for other in (name, bare, f"model.{bare}"):
            assert not any(match_name(other, pattern) for pattern in patterns)


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vision tower has layers, attention and projections of the same names as the text model."""
    return support.saved("llama4", tmp_path_factory.mktemp("llama4"), num_layers=2)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


@pytest.fixture(scope="module")
def quantized(llama4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its text model, by our modifier."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    recipe = RouterAwareQuantModifier(
        schemes=["W8A16"],
        group_size=32,
        target_bits=9,
        sensitivity="random",
        attention_scheme="FP8_DYNAMIC",
        dense_scheme="FP8_DYNAMIC",
    )
    support.trim(open_moe(llama4), recipe, no_data=True, output_dir=str(out))
    return out


def test_our_schemes_leave_the_tower_alone(llama4: Path, quantized: Path) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (llama4, quantized))
    tower = {name for name in before if not name.startswith("language_model.")}
    assert tower == {name for name in after if not name.startswith("language_model.")}
    assert all(torch.equal(before[name], after[name]) for name in tower)
    scales = {name for name in after if name.endswith("self_attn.q_proj.weight_scale")}
    assert scales == {f"language_model.model.layers.{i}.self_attn.q_proj.weight_scale" for i in (0, 1)}
    assert "quant-tower" not in {finding.code for finding in check_checkpoint(quantized).findings}


def test_what_the_text_config_says_of_quantization_counts(quantized: Path, tmp_path: Path) -> None:
    """Some multimodal checkpoints say it there, and transformers and vLLM look there."""
    nested = shutil.copytree(quantized, tmp_path / "nested")
    config = json.loads((nested / "config.json").read_text())
    said = config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (nested / "config.json").write_text(json.dumps(config))
    assert check_checkpoint(nested).findings == check_checkpoint(quantized).findings
    assert inspect_model(nested).quantization == "compressed-tensors"
    expected = support.logits(open_moe(quantized))
    torch.testing.assert_close(support.logits(open_moe(nested)), expected, atol=1e-6, rtol=0)
    out = tmp_path / "out"
    support.trim(open_moe(nested), BlockDropModifier(blocks=[1]), no_data=True, output_dir=str(out))
    written = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in written and not check_checkpoint(out).errors
    assert len(written["text_config"]["quantization_config"]["config_groups"]) == len(said["config_groups"])
    said["config_groups"]["group_0"]["weights"]["group_size"] = 48
    (nested / "config.json").write_text(json.dumps(config))
    assert check_checkpoint(nested).errors


def test_our_smoothing_leaves_the_tower_alone(llama4: Path) -> None:
    model = open_moe(llama4)
    mappings = awq_mappings(model)
    patterns = [p for mapping in mappings for p in (mapping.smooth_layer, *mapping.balance_layers)]
    matched = {name for name, _ in match_named_modules(model, patterns)}
    assert "language_model.model.layers.1.self_attn.q_proj" in matched
    assert not any(name.startswith("vision_model.") for name in matched)


def test_targets_that_reach_the_tower_are_told(llama4: Path, tmp_path: Path, warnings: list[str]) -> None:
    """llm-compressor's modifiers do what their targets say."""
    recipe = [
        QuantizationModifier(
            targets=["re:.*self_attn.q_proj$", "re:.*self_attn.k_proj$", "re:.*self_attn.v_proj$"],
            scheme="FP8_DYNAMIC",
        ),
        RouterAwareQuantModifier(schemes=["W8A16"], group_size=32, target_bits=9, sensitivity="random"),
    ]
    out = tmp_path / "out"
    support.trim(open_moe(llama4), recipe, no_data=True, output_dir=str(out))
    assert any("targets 3 Linears of 'vision_model', which stands beside" in message for message in warnings)
    assert f"{VISION}.q_proj.weight_scale" in load_file(out / "model.safetensors")
    assert _tower(out) == "3 modules beside the text model are quantized, " + (
        f"{VISION}.q_proj for one: its targets name them"
    )
    for targets, how in (
        (
            ["re:.*self_attn.[qkv]_proj$"],
            "its target 're:.*self_attn.[qkv]_proj$' names layers of the text model",
        ),
        (["Linear"], "its targets name a class of modules"),
    ):
        changed = shutil.copytree(out, tmp_path / targets[0].replace("*", ""))
        config = json.loads((out / "config.json").read_text())
        groups = config["quantization_config"]["config_groups"]
        group = next(g for g in groups.values() if any("vision_model" in target for target in g["targets"]))
        group["targets"] = targets
        (changed / "config.json").write_text(json.dumps(config))
        assert how in _tower(changed)


def _tower(path: Path) -> str:
    (finding,) = [f for f in check_checkpoint(path).findings if f.code == "quant-tower"]
    assert finding.severity.value == "warning" and finding.subject == "vision_model"
    return finding.message
