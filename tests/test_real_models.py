"""Sizes of real models, computed from their public configs: against what their publishers' weight files hold, and
docs/recipes.md against what is computed and what its code does.
"""

import json
import re
from pathlib import Path

import pytest
import support
import torch
from recipe_table import CONFIGS, DOCUMENT, MODELS, ROOM, TAKEN, fits, tables_in, updated
from safetensors.torch import load_file, save_file

from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.inspection import inspect_model

# `total_size` in the model.safetensors.index.json of each published checkpoint; gpt-oss-20b has MXFP4 experts.
PUBLISHED = {
    "Mixtral-8x7B-v0.1": ("UNQUANTIZED", 93_405_585_408),
    "Qwen3-30B-A3B": ("UNQUANTIZED", 61_064_245_248),
    "DeepSeek-V2-Lite": ("UNQUANTIZED", 31_412_968_448),
    "OLMoE-1B-7B-0924": ("UNQUANTIZED", 13_838_323_712),
    "gpt-oss-20b": ("MXFP4A16", 13_761_264_768),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_is_that_of_the_published_files(name):
    scheme, nbytes = PUBLISHED[name]
    inspection = inspect_model(CONFIGS / name, [scheme])
    assert inspection.nbytes_in(inspection.schemes[0]) == nbytes


def test_deepseek_moe_has_the_parameters_that_its_authors_state():
    """16.38 billion, of which 2.8 are active: https://huggingface.co/deepseek-ai/deepseek-moe-16b-base."""
    inspection = inspect_model(CONFIGS / "DeepSeek-MoE-16B-base")
    assert (inspection.architecture, inspection.blocks) == ("DeepseekForCausalLM", 28)
    assert {(layer.experts, layer.top_k, layer.shared_experts) for layer in inspection.moe_layers} == {
        (64, 6, True)
    }
    assert round(inspection.parameters / 1e9, 2) == 16.38
    assert round(inspection.active_parameters / 1e9, 1) == 2.8


def test_every_model_has_a_table():
    assert sorted(tables_in(DOCUMENT.read_text())) == sorted(model.config for model in MODELS)


def test_page_is_up_to_date():
    text = DOCUMENT.read_text()
    assert updated(text) == text, "run: python tests/recipe_table.py"


def test_fits_leaves_room():
    limit = int(TAKEN * 24e9) - ROOM
    assert (fits(limit), fits(limit + 1)) == ("24 GB", "48 GB")
    assert fits(90 * 10**9) == "2 x 80 GB"


# The 16 values of a four-bit float (OCP Microscaling Formats, E2M1).
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def random_mxfp4(shape: torch.Size, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks and scales as published for weights [experts, in, out], and the values that they stand for."""
    experts, inputs, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 126, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
    pairs = torch.stack([E2M1[(blocks & 15).long()], E2M1[(blocks >> 4).long()]], dim=-1)
    values = pairs.flatten(-2) * torch.exp2(scales.float() - 127)[..., None]
    return blocks, scales, values.flatten(-2).transpose(1, 2)


def test_gpt_oss_is_unpacked_as_the_page_says(tmp_path, monkeypatch):
    published = support.saved("gpt_oss", tmp_path).rename(tmp_path / "gpt-oss-20b")
    values = {}
    tensors = {}
    for seed, (name, tensor) in enumerate(load_file(published / "model.safetensors").items()):
        if name.endswith("_proj") and ".experts." in name:
            blocks, scales, values[name] = random_mxfp4(tensor.shape, seed)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    real = json.loads((CONFIGS / "gpt-oss-20b" / "config.json").read_text())
    config = json.loads((published / "config.json").read_text())
    config.pop("dtype")
    config["quantization_config"] = real["quantization_config"]
    (published / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?Mxfp4Config.*?)```", DOCUMENT.read_text(), re.DOTALL)[1], {})
    unpacked = load_file("gpt-oss-20b-bf16/model.safetensors")
    assert values
    for name, expected in values.items():
        assert torch.equal(unpacked[name].float(), expected), name
    assert "quantization_config" not in json.loads(Path("gpt-oss-20b-bf16/config.json").read_text())
    assert check_checkpoint("gpt-oss-20b-bf16").ok
