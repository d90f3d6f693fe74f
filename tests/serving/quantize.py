"""Packs experts by hand in the format that compressed-tensors defines; plans and references for packed ones."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

BITS = 4
LARGEST = 2 ** (BITS - 1) - 1


def _quantize(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers like `weight` [..., in], and one scale per `group` inputs, [..., in / group]."""
    grouped = weight.unflatten(-1, (-1, group))
    scale = grouped.abs().amax(-1) / LARGEST
    return (grouped / scale[..., None]).round().flatten(-2).to(torch.int8), scale


@torch.no_grad()
def round_experts(model: PreTrainedModel, groups: Mapping[int, int]) -> None:
    """Give the experts of each layer, in place, the values they have in int4; `groups` are sizes by layer."""
    for index, group in groups.items():
        for name, weight in model.model.layers[index].named_parameters():
            if "experts." in name and "shared" not in name:
                integers, scale = _quantize(weight, group)
                weight.copy_((integers.unflatten(-1, (-1, group)) * scale[..., None]).flatten(-2))


def pack_experts(folder: pathlib.Path, groups: Mapping[int, int]) -> None:
    """Replace the rounded experts of the checkpoint in `folder` by packed integers and scales."""
    packed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        index = next((i for i in groups if f".layers.{i}." in name), None)
        if index is None or ".experts." not in name:
            packed[name] = tensor
            continue
        integers, scale = _quantize(tensor, groups[index])
        stem = name.removesuffix(".weight")
        packed[f"{stem}.weight_packed"] = pack_to_int32(integers, BITS).contiguous()
        packed[f"{stem}.weight_scale"] = scale
        packed[f"{stem}.weight_shape"] = torch.tensor(tensor.shape)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = _quantization_config(groups)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _quantization_config(groups: Mapping[int, int]) -> dict:
    def scheme(index: int, group: int) -> dict:
        weights = {
            "num_bits": BITS,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": group,
        }
        return {"targets": [rf"re:.*layers\.{index}\..*\.experts\.\d+\..*"], "weights": weights}

    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"layer_{i}": scheme(i, group) for i, group in groups.items()},
        "ignore": ["lm_head"],
    }


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The loaded model, in place, with weights decompressed to float32 and inputs that are never rounded."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.compressor.decompress_model(model)
    for module in model.modules():
        module.quantization_enabled = False
    # transformers forbids `model.float()` after quantization.
    return torch.nn.Module.float(model)


def write_plan(path: pathlib.Path, layers: Mapping[int, str | Sequence[str]], group: int) -> pathlib.Path:
    """A plan of RouterAwareQuantModifier by hand: block index -> preset, or one preset per expert."""
    presets = {
        name for chosen in layers.values() for name in ([chosen] if isinstance(chosen, str) else chosen)
    }
    plan = {
        "modifier": "RouterAwareQuantModifier",
        "schemes": {name: _preset(name, group) for name in sorted(presets)},
        "layers": {
            str(layer): {"scheme": chosen if isinstance(chosen, str) else dict(enumerate(chosen))}
            for layer, chosen in layers.items()
        },
    }
    path.write_text(json.dumps(plan, indent=2))
    return path


def _preset(name: str, group: int) -> dict | None:
    if name == "UNQUANTIZED":
        return None
    scheme = preset_name_to_scheme(name, [])
    if scheme.weights.type == "int" and scheme.weights.strategy == "group":
        scheme.weights.group_size = group
    return scheme.model_dump(mode="json", exclude={"targets"})
