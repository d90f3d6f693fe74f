"""Checkpoints with compressed experts load in `load_trimmed_moe`, for every family that can be compressed.

llm-compressor quantizes and saves, stock; the model in memory before saving says what has to come out.
"""

import json
import pathlib
import re
from dataclasses import dataclass

import pytest
import support
import tiny_models
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from cut_by_hand import Cut, load, logits
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompressor_moe import load_trimmed_moe
from llmcompressor_moe.loading import open_as_served

# Experts for text and for images go by the same numbers, and their modules by names that no file has.
NOT_QUANTIZED = ("ernie4_5_vl_moe",)
# Stock transformers loads these too: experts apart in the family's own checkpoints, and by these names.
STOCK_READS = ("qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe")
# One family of each way to store experts.
CUT = (
    "mixtral",
    "qwen3_moe",
    "granitemoe",
    "gpt_oss",
    "llama4_text",
    "deepseek_v3",
    "lfm2_moe",
    "qwen3_vl_moe",
)
W4 = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
EXPERT_LINEARS = r"re:.*experts\.\d+\.(gate|up|down)_proj$"


def quantize(source: pathlib.Path, target: pathlib.Path, ignore: list[str] | None = None) -> PreTrainedModel:
    """W4A16 experts, saved compressed; the model in memory computes with the rounded weights."""
    model, _ = load(source)
    scheme = QuantizationScheme(targets=[EXPERT_LINEARS], weights=W4)
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"experts": scheme}, ignore=ignore or []))
    model.save_pretrained(target, save_compressed=True)
    return model


def rename(source: pathlib.Path, target: pathlib.Path, names: dict[str, str]) -> pathlib.Path:
    """A copy of a checkpoint with other names for the projections of experts."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    pattern = re.compile(rf"(experts\.\d+\.)({'|'.join(names)})\.")
    tensors = {
        pattern.sub(lambda m: f"{m[1]}{names[m[2]]}.", name): tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@dataclass
class Quantized:
    cut: Cut
    model: PreTrainedModel
    path: pathlib.Path


@pytest.fixture(
    scope="module", params=[name for name in tiny_models.buildable() if name not in NOT_QUANTIZED]
)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    tmp = tmp_path_factory.mktemp(request.param)
    cut = Cut(request.param, tmp)
    return Quantized(cut, quantize(cut.whole, tmp / "quantized"), tmp / "quantized")


def assert_loads(path: pathlib.Path, expected: torch.Tensor) -> PreTrainedModel:
    with load_trimmed_moe():
        model, info = load(path)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    return model


def test_compressed_experts_load(quantized: Quantized, tmp_path: pathlib.Path) -> None:
    expected = logits(quantized.model)
    assert (expected - logits(quantized.cut.model)).abs().max() > 0.05
    model = assert_loads(quantized.path, expected)
    assert any(isinstance(module, LinearExperts2D) for module in model.modules())
    if quantized.cut.model_type in STOCK_READS:
        stock, _ = load(quantized.path)
        torch.testing.assert_close(logits(stock), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantized", CUT, indirect=True)
def test_cut_and_compressed_checkpoint_loads(
    quantized: Quantized, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    with quantized.cut.off(quantized.model, monkeypatch):
        expected = logits(quantized.model)
    path = quantized.cut.write(quantized.path, tmp_path / "cut")
    with pytest.raises(Exception, match=r"per-layer attribute"):
        load(path)
    assert_loads(path, expected)


@pytest.mark.parametrize("native", [False, True])
def test_mixtral_loads_by_either_names_with_a_layer_left_alone(tmp_path: pathlib.Path, native: bool) -> None:
    """Its checkpoints say w1, w3, w2 and block_sparse_moe where the model says mlp."""
    tiny_models.build("mixtral").save_pretrained(tmp_path / "plain")
    left_alone = r"re:.*layers\.1\..*experts.*"
    expected = logits(quantize(tmp_path / "plain", tmp_path / "quantized", ignore=[left_alone]))
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if native else {}
    path = rename(tmp_path / "quantized", tmp_path / "renamed", names) if native else tmp_path / "quantized"
    stored = load_file(path / "model.safetensors")
    plain = [name for name in stored if ".experts." in name and name.endswith(".weight")]
    assert plain and all(".layers.1." in name for name in plain)
    assert_loads(path, expected)


def test_layers_compressed_in_different_ways(tmp_path: pathlib.Path) -> None:
    """4 and 8 bits, by layer; transformers alone would read all experts by one of the schemes."""
    tiny_models.build("qwen3_moe").save_pretrained(tmp_path / "plain")
    model, _ = load(tmp_path / "plain")
    w8 = W4.model_copy(update={"num_bits": 8})
    groups = {
        "low": QuantizationScheme(targets=[r"re:.*layers\.[02]\..*experts\.\d+\..*_proj$"], weights=W4),
        "high": QuantizationScheme(targets=[r"re:.*layers\.[13]\..*experts\.\d+\..*_proj$"], weights=w8),
    }
    oneshot(model=model, recipe=QuantizationModifier(config_groups=groups))
    model.save_pretrained(tmp_path / "quantized", save_compressed=True)
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    assert len(config["quantization_config"]["config_groups"]) == 2
    assert_loads(tmp_path / "quantized", logits(model))


def kinds_of_presets() -> dict[str, QuantizationScheme]:
    """One preset for each way to store weights and to round inputs, whatever the bits of packed integers."""
    kinds: dict[tuple, str] = {}
    for name in PRESET_SCHEMES:
        scheme = preset_name_to_scheme(name, [])
        if scheme.weights is not None:
            form = infer_module_format(torch.nn.Linear, scheme)
            kinds.setdefault((form, scheme.weights.symmetric, repr(scheme.input_activations)), name)
    return {name: preset_name_to_scheme(name, []) for name in kinds.values()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_presets_load_and_run_in_every_dtype(tmp_path: pathlib.Path, dtype: torch.dtype) -> None:
    """A block each; compressed-tensors itself makes FP4 and MX weights bfloat16, which no other model can run."""
    groups = kinds_of_presets()
    assert {"NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16"} < groups.keys()
    for layer, scheme in enumerate(groups.values()):
        scheme.targets = [rf"re:.*layers\.{layer}\..*(experts\.\d+\.down|o)_proj$"]
    options = {"num_layers": len(groups), "num_experts": 2, "hidden_size": 128, "moe_intermediate_size": 128}
    tiny_models.build("qwen3_moe", **options).to(dtype).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    data = {"dataset": support.dataset(), "num_calibration_samples": 2, "pipeline": "basic"}
    oneshot(model=model, recipe=QuantizationModifier(config_groups=groups), **data)
    expected = logits(model)
    model.save_pretrained(tmp_path / "quantized", save_compressed=True)
    with load_trimmed_moe():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype="auto")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), expected)
    again = open_as_served(tmp_path / "quantized")
    assert torch.equal(logits(again), expected)


def test_compressed_model_is_saved_as_it_was_loaded(tmp_path: pathlib.Path) -> None:
    tiny_models.build("granitemoe").save_pretrained(tmp_path / "plain")
    expected = logits(quantize(tmp_path / "plain", tmp_path / "quantized"))
    with load_trimmed_moe():
        model, _ = load(tmp_path / "quantized")
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("quantized", "again"))
    assert first.keys() == second.keys()
    assert_loads(tmp_path / "again", expected)
