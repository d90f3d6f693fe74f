"""Rules about multi-token-prediction (draft) layers: announced, present, and cut like the rest."""

import re

from llmcompressor_moe.check.comparison import Comparison
from llmcompressor_moe.check.config import ReadConfig
from llmcompressor_moe.check.expected import ExpectedModel, layer_of
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.check.stack import mtp_layers
from llmcompressor_moe.checkpoint.layout import CheckpointLayout, TensorInfo
from llmcompressor_moe.families import MTP_COUNTS

_COMPONENT = re.compile(r"(^|\.)mtp(_layers|_block)?(\.|$)")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d{1,6})\.")
_FUSED = re.compile(r"\.experts\.[^.]*(gate_up|up_proj|down_proj|w13|w2)[^.]*(\.weight)?$")
_ROUTER = re.compile(r"\.(gate|router)\.([a-z_]+\.)?(weight|bias|e_score_correction_bias)$")
# What a draft layer has and an ordinary block has not.
_DRAFT_PARTS = (
    "eh_proj",
    "enorm",
    "hnorm",
    "shared_head",
    "embed_norm",
    "hidden_norm",
    "input_proj",
    "final_layernorm",
)


def check_mtp(
    config: ReadConfig,
    expected: ExpectedModel,
    layout: CheckpointLayout,
    comparison: Comparison,
    findings: Findings,
) -> None:
    """MTP layers against what config.json announces. Takes their tensors out of the comparison."""
    announced = mtp_layers(config.raw_text) or mtp_layers(config.raw) or mtp_layers(_resolved(config))
    found = _mtp_tensors(config, expected, comparison, announced)
    if announced and not found:
        stated = mtp_layers(config.raw_text) or mtp_layers(config.raw)
        if stated:
            findings.warning(
                "mtp-missing",
                "num_nextn_predict_layers",
                f"config.json announces {stated} MTP layer(s), no file holds one: speculative decoding with "
                "them fails",
                "copy them from the base model, or set the field to 0",
            )
        return
    if not found:
        return
    if not announced:
        findings.error(
            "mtp-unannounced",
            next(iter(found)),
            f"{len(found)} tensors of MTP layers are stored, config.json announces none: vLLM fails on them",
            "set num_nextn_predict_layers (or the family's name for it), or delete the tensors",
        )
    else:
        _check_experts(config, expected, found, findings)
    comparison.forget(found)


def _resolved(config: ReadConfig) -> dict:
    return {name: config.value(name) for name in MTP_COUNTS}


def _mtp_tensors(
    config: ReadConfig, expected: ExpectedModel, comparison: Comparison, announced: int
) -> dict[str, TensorInfo]:
    last = config.num_layers
    trailing: dict[int, dict[str, TensorInfo]] = {}
    found: dict[str, TensorInfo] = {}
    for name, tensor in comparison.extra.items():
        layer = layer_of(name, expected.layers_path)
        if _COMPONENT.search(name):
            found[name] = tensor
        elif layer is not None and layer >= last:
            trailing.setdefault(layer, {})[name] = tensor
        elif any(pattern.search(name) for pattern in expected.ignore_unexpected):
            found[name] = tensor
    for layer, tensors in trailing.items():
        # an ordinary block behind the last one means that num_hidden_layers lies
        draft = any(part in name.split(".") for name in tensors for part in _DRAFT_PARTS)
        if draft and (layer < last + announced or not announced):
            found |= tensors
    return found


def _check_experts(
    config: ReadConfig, expected: ExpectedModel, found: dict[str, TensorInfo], findings: Findings
) -> None:
    if config.expert_attribute is None:
        return
    count = config.value(config.expert_attribute)
    indices: dict[str, set[int]] = {}
    counts: dict[str, int] = {}
    for name, tensor in found.items():
        if match := _EXPERT.match(name):
            indices.setdefault(match[1], set()).add(int(match[2]))
        elif _FUSED.search(name) and len(tensor.shape) == 3:
            counts[name] = tensor.shape[0]
    # a gap counts as the number of names that would be needed
    counts |= {place: max(len(stored), max(stored) + 1) for place, stored in indices.items()}
    for place, stored in counts.items():
        if stored != count:
            findings.error(
                "mtp-experts",
                place,
                f"an MTP layer with {stored} experts, config.json says {count}: the draft fails to load",
                "drop as many experts from the MTP layer, or switch MTP off and delete its tensors",
            )
    for name, tensor in found.items():
        if _ROUTER.search(name) and tensor.shape and tensor.shape[0] != count and ".experts." not in name:
            findings.error(
                "mtp-experts",
                name,
                f"scores {tensor.shape[0]} experts, config.json says {count}",
                "cut the MTP layer's router like the others, or switch MTP off",
            )
