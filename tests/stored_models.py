"""Tiny checkpoints that are stored quantized, as model makers store them, beside the same values plain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import support
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]
BLOCK = 32
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
# vLLM hands its quantization config to the routers of this family, so releases leave them out.
FP8_QWEN = FP8 | {"modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(4))]}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def fp8(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
    """What is stored of a weight in blocks of FP8, and the values that this gives; None for what stays plain."""
    if (
        not name.endswith(("_proj.weight", "_proj_with_mqa.weight"))
        or weight.ndim != 2
        or any(size % BLOCK for size in weight.shape)
    ):
        return None
    blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-9) / 448
    stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    plain = (stored.float() * scale[:, None, :, None]).reshape(weight.shape)
    return {name: stored.reshape(weight.shape).contiguous(), f"{name}_scale_inv": scale}, plain.contiguous()


def mxfp4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
    """Random MXFP4 experts in the layout of gpt-oss, and what transformers makes of them; biases fit bfloat16."""
    if name.endswith("_proj_bias"):
        return {name: (bias := weight.bfloat16().float())}, bias
    if not name.endswith(("gate_up_proj", "down_proj")) or weight.ndim != 3:
        return None
    experts, columns, rows = weight.shape
    generator = torch.Generator().manual_seed(len(name))
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    plain = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, plain.contiguous()


def stored_as(
    model_type: str,
    directory: Path,
    encode: Callable,
    quantization: dict,
    tensors: Tensors | None = None,
    **options: Any,
) -> tuple[Path, Path]:
    """A tiny checkpoint stored quantized, and one that holds the same values plain."""
    source = support.saved(model_type, directory, **options)
    quantized, plain = directory / "quantized", directory / "plain"
    stored: Tensors = dict(tensors or {})
    values: Tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        encoded = encode(name, weight)
        stored |= encoded[0] if encoded else {name: weight}
        values[name] = encoded[1] if encoded else weight
    for path, content in ((quantized, stored), (plain, values)):
        shutil.copytree(source, path)
        save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    edit(quantized, quantization_config=quantization)
    return quantized, plain


def edit(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))
