"""Checkpoints that are stored quantized: opened, cut as they are stored, quantized again on request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import support
import torch
from safetensors.torch import load_file, save_file
from stored_models import FP8, FP8_QWEN, MXFP4, edit, fp8, mxfp4, stored_as

from llmcompressor_moe import (
    BlockDropModifier,
    ExpertDropModifier,
    LayerDropModifier,
    RouterAwareQuantModifier,
    load_trimmed_moe,
    open_moe,
)
from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.checkpoint.encodings import UnreadablePrecisionError


def contents(path: Path) -> set[tuple[str, str]]:
    """(dtype, hash) of every stored tensor."""
    return {
        (
            str(tensor.dtype),
            sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
        )
        for tensor in load_file(path / "model.safetensors").values()
    }


RECIPES = {
    "deepseek_v3": lambda: [BlockDropModifier(blocks=[3]), ExpertDropModifier(num_drop=2, criterion="reap")],
    "gpt_oss": lambda: [BlockDropModifier(blocks=[2, 3]), ExpertDropModifier(experts={0: [1, 4]})],
    "qwen3_moe": lambda: [LayerDropModifier(layers=[2]), ExpertDropModifier(num_drop=2, scope="global")],
}


@pytest.mark.parametrize(
    ("model_type", "encode", "quantization"),
    [("deepseek_v3", fp8, FP8), ("gpt_oss", mxfp4, MXFP4), ("qwen3_moe", fp8, FP8_QWEN)],
)
def test_drops_keep_the_stored_precision(
    model_type: str, encode: Callable, quantization: dict, tmp_path: Path
) -> None:
    quantized, plain = stored_as(model_type, tmp_path, encode, quantization)
    out = tmp_path / "out"
    model = support.trim(open_moe(quantized), RECIPES[model_type](), output_dir=str(out))
    expected = support.logits(support.trim(open_moe(plain), RECIPES[model_type]()))
    torch.testing.assert_close(support.logits(model), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(support.logits(open_moe(out)), expected, atol=1e-5, rtol=0)
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    left_out = {"modules_to_not_convert": None}
    assert written | left_out == quantization | left_out
    assert not check_checkpoint(out).errors
    # What is new are rows of routers, and fused tensors without the experts that went.
    names = load_file(out / "model.safetensors")
    cut = [
        name
        for name in names
        if ".gate" in name or ".router" in name or "experts.gate_up" in name or "experts.down" in name
    ]
    assert len(contents(out) - contents(quantized)) <= len(cut)
    with pytest.raises(ValueError, match="requantize=True"):
        support.trim(
            open_moe(quantized), RouterAwareQuantModifier(schemes=["W8A16"], group_size=32, target_bits=9)
        )


def test_packed_checkpoints_are_cut_and_packed_again_on_request(tmp_path: Path) -> None:
    source = support.saved("mixtral", tmp_path)
    recipe = RouterAwareQuantModifier(
        schemes=["W4A16", "W8A16"], group_size=32, target_bits=6.5, attention_scheme="FP8_DYNAMIC"
    )
    packed, plain, out = (tmp_path / name for name in ("packed", "decoded", "out"))
    support.trim(open_moe(source), recipe, output_dir=str(packed))
    open_moe(packed, requantize=True).save_pretrained(plain)
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())

    def cut() -> list:
        return [BlockDropModifier(blocks=[1]), ExpertDropModifier(num_drop=2, criterion="reap")]

    model = support.trim(open_moe(packed), cut(), output_dir=str(out))
    expected = support.logits(support.trim(open_moe(plain), cut()))
    torch.testing.assert_close(support.logits(model), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        support.logits(support.load(plain)), support.logits(open_moe(packed)), atol=1e-5, rtol=0
    )
    report = check_checkpoint(out)
    assert not report.errors
    assert not [finding for finding in report.findings if "one-sided" in finding.code]
    again = tmp_path / "again"
    eight = RouterAwareQuantModifier(schemes=["W8A16"], group_size=32, target_bits=9)
    support.trim(open_moe(packed, requantize=True), eight, output_dir=str(again))
    groups = json.loads((again / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {8}


@pytest.mark.parametrize("family", ["granitemoe", "llama4_text"])
def test_decoded_experts_take_the_form_of_their_family(family: str, tmp_path: Path) -> None:
    recipe = RouterAwareQuantModifier(schemes=["W4A16", "W8A16"], group_size=32, target_bits=6.5)
    packed, decoded = tmp_path / "packed", tmp_path / "decoded"
    support.trim(open_moe(support.saved(family, tmp_path)), recipe, output_dir=str(packed))
    model = support.trim(
        open_moe(packed, requantize=True), ExpertDropModifier(experts={0: [1]}), output_dir=str(decoded)
    )
    with load_trimmed_moe():
        found = support.logits(support.load(decoded))
    torch.testing.assert_close(found, support.logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "modelopt"])
def test_precisions_that_cannot_be_read_are_refused_by_name(method: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(support.saved("qwen3_moe", tmp_path), path)
    edit(path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises((UnreadablePrecisionError, ValueError), match=f"(?i){method}"):
        open_moe(path)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("deepseek_v3", {"num_nextn_predict_layers": 1}),
        ("minimax_m2", {"use_mtp": True, "num_mtp_modules": 3}),
        ("qwen3_next", {"mtp_num_hidden_layers": 1}),
    ],
)
def test_mtp_layers_that_no_file_holds_are_not_announced(
    family: str, fields: dict[str, int], tmp_path: Path
) -> None:
    source, path, out = support.saved(family, tmp_path), tmp_path / "mtp", tmp_path / "out"
    shutil.copytree(source, path)
    edit(path, **fields)
    support.trim(
        open_moe(path),
        ExpertDropModifier(num_drop=2, criterion="weight_norm"),
        no_data=True,
        output_dir=str(out),
    )
    config = json.loads((out / "config.json").read_text())
    assert {name: config[name] for name in fields} == {name: type(value)() for name, value in fields.items()}
    assert "switched off: no file of the source holds one" in (out / "README.md").read_text()
    assert check_checkpoint(out).ok


@pytest.mark.parametrize(
    ("recipe", "layers", "experts", "said"),
    [
        (lambda: BlockDropModifier(blocks=[2]), 1, 8, "kept"),
        (
            lambda: ExpertDropModifier(experts={layer: [0, 5] for layer in (1, 2, 3)}),
            1,
            6,
            "cut to the same number",
        ),
        (lambda: ExpertDropModifier(experts={1: [0, 5]}), 0, 0, "switched off"),
    ],
)
def test_mtp_layers_follow(recipe: Callable, layers: int, experts: int, said: str, tmp_path: Path) -> None:
    source, path, out = support.saved("deepseek_v3", tmp_path), tmp_path / "mtp", tmp_path / "out"
    shutil.copytree(source, path)
    tensors = load_file(source / "model.safetensors")
    draft = {
        name.replace(".3.", ".4.", 1): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.3." in name
    }
    # Experts 1 and 6 are the smallest.
    for name, tensor in draft.items():
        if ".experts.1." in name or ".experts.6." in name:
            tensor *= 0.1
    draft["model.layers.4.eh_proj.weight"] = torch.randn(64, 128)
    draft |= {
        f"model.layers.4.{name}.weight": torch.ones(64) for name in ("enorm", "hnorm", "shared_head.norm")
    }
    save_file(tensors | draft, path / "model.safetensors", metadata={"format": "pt"})
    edit(path, num_nextn_predict_layers=1)
    support.trim(open_moe(path), recipe(), no_data=True, output_dir=str(out))
    config = json.loads((out / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == layers
    assert said in (out / "README.md").read_text()
    last = f"model.layers.{config['num_hidden_layers']}."
    stored = {
        name.removeprefix(last): tensor
        for name, tensor in load_file(out / "model.safetensors").items()
        if name.startswith(last)
    }
    assert bool(stored) == bool(layers)
    if stored:
        kept = [index for index in range(8) if experts == 8 or index not in (1, 6)]
        gate = draft["model.layers.4.mlp.gate.weight"][kept]
        assert torch.equal(stored["mlp.gate.weight"], gate)
        for new, old in enumerate(kept):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                was = draft[f"model.layers.4.mlp.experts.{old}.{projection}.weight"]
                assert torch.equal(stored[f"mlp.experts.{new}.{projection}.weight"], was)
        assert f"mlp.experts.{experts}.up_proj.weight" not in stored


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_weights_are_converted_on_request(model_type: str, tmp_path: Path) -> None:
    source, out = support.saved(model_type, tmp_path), tmp_path / "out"
    recipe = ExpertDropModifier(experts={layer: [7] for layer in range(4)})
    support.trim(open_moe(source, dtype="bfloat16"), recipe, no_data=True, output_dir=str(out))
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in after.items():
        # The last expert went, so what is left comes first.
        kept = before[name][tuple(slice(size) for size in tensor.shape)]
        assert torch.equal(tensor, kept.bfloat16()), name
