"""Compresses experts, and changes compressed checkpoints, by compressed-tensors itself."""

import copy
import re

import torch
from breaking import edit_json, edit_tensors, rename
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

NATIVE = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
PLAIN = ["lm_head", "re:.*gate$", "re:.*shared_expert_gate$"]
EXPERT = re.compile(r"experts\.(\d+)\.(gate_proj|up_proj|down_proj)")


def w4(targets=("Linear",), bits: int = 4, group: int = 32, symmetric: bool = True) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group
    )
    return QuantizationScheme(targets=list(targets), weights=weights)


SCHEMES = {
    "W4A16": {"config_groups": {"a": w4()}},
    "W4A16_ASYM": {"config_groups": {"a": w4(symmetric=False)}},
    "W8A8": {"targets": "Linear", "scheme": "W8A8"},
    "FP8": {"targets": "Linear", "scheme": "FP8"},
    "FP8_DYNAMIC": {"targets": "Linear", "scheme": "FP8_DYNAMIC"},
}
# What transformers alone cannot decompress, or not in the dtype of these models.
BEYOND_TRANSFORMERS = {
    "MXFP8A16": {"targets": "Linear", "scheme": "MXFP8A16"},
    "NVFP4A16": {"targets": "Linear", "scheme": "NVFP4A16"},
}


def to_native(path) -> None:
    """Give Mixtral's experts their own names."""
    rename(path, lambda name: EXPERT.sub(lambda m: f"experts.{m[1]}.{NATIVE[m[2]]}", name))


def change_config(path, change) -> None:
    edit_json(path / "config.json", lambda config: change(config["quantization_config"]))


def decompress(tensors: dict[str, torch.Tensor], module: str) -> None:
    for leaf in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{module}.{leaf}"]
    tensors[f"{module}.weight"] = torch.zeros(64, 64)


def split_groups(path, *rules: tuple[str, dict]) -> None:
    """Put a group before the first for each (target, weights)."""

    def change(q):
        base = q["config_groups"].pop("group_0")
        for index, (target, weights) in enumerate(rules):
            group = copy.deepcopy(base)
            group["targets"] = [target]
            group["weights"].update(weights)
            q["config_groups"][f"special_{index}"] = group
        q["config_groups"]["group_0"] = base

    change_config(path, change)


def repack(path, modules: str, bits: int, group: int) -> None:
    """Store matching modules at another precision, by compressed-tensors itself."""

    def change(tensors):
        for name in [n for n in tensors if re.search(modules + r"\.weight_packed$", n)]:
            module = name.removesuffix(".weight_packed")
            linear = torch.nn.Linear(64, 64, bias=False)
            initialize_module_for_quantization(linear, w4(bits=bits, group=group))
            linear.weight_scale.data.fill_(0.1)
            compress_module(linear)
            tensors |= {f"{module}.{k}": v.data for k, v in linear.state_dict().items()}

    edit_tensors(path, change)
