"""Reads `quantization_config` and answers which scheme a module gets, the way its readers match names."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
)

from llmcompressor_moe.check.config import first_line
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.checkpoint.compressed import compressed_tensors_of
from llmcompressor_moe.checkpoint.config_parts import QUANTIZATION as FIELD
from llmcompressor_moe.checkpoint.layout import FLOATS, CheckpointLayout

# Local names of quantization parameters.
QPARAM = re.compile(
    r"\.((weight|input|output)_(scale|zero_point|global_scale|g_idx|packed|shape)|[qkv]_(scale|zero_point))$"
)

# Local names of tensors that no plain module has, in any format. Formats without them keep the name `weight`, but
# not its dtype.
_COMPRESSED = (
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_scale_inv",
    "qweight",
)

_SAFETENSORS_DTYPE = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def is_compressed(layout: CheckpointLayout, module: str) -> bool:
    """Whether the weight of a module is stored quantized, in any format; found from names and dtypes."""
    if any(f"{module}.{leaf}" in layout.tensors for leaf in _COMPRESSED):
        return True
    weight = layout.tensors.get(f"{module}.weight")
    return weight is not None and weight.dtype not in FLOATS


class _Names:
    """A list of names and `re:` patterns, with the group each stands for."""

    def __init__(self) -> None:
        self.exact: dict[str, int] = {}
        self.patterns: list[tuple[re.Pattern, int]] = []

    def add(self, target: str, group: int) -> None:
        if target.startswith("re:"):
            self.patterns.append((re.compile(target.removeprefix("re:")), group))
        else:
            self.exact.setdefault(target, group)

    def matches(self, name: str) -> list[int]:
        found = [self.exact[name]] if name in self.exact else []
        return found + [group for pattern, group in self.patterns if pattern.match(name)]


@dataclass
class Schemes:
    """The quantization of a checkpoint: schemes by group, and who is in which group."""

    config: QuantizationConfig
    groups: list[str]
    schemes: list[QuantizationScheme]
    ignore: _Names = field(default_factory=_Names)
    targets: _Names = field(default_factory=_Names)

    def group_of(self, name: str, classes: tuple[str, ...] = ("Linear",)) -> int | None:
        """Index of the scheme that module `name` gets, None if it stays plain.

        A name that is ignored stays plain, then targets that match the name win over those that match the
        class. `classes` are the class names a target may give.
        """
        if self.ignore.matches(name) or any(c in self.ignore.exact for c in classes):
            return None
        for group in self.targets.matches(name):
            return group
        for cls in classes:
            if cls in self.targets.exact:
                return self.targets.exact[cls]
        return None

    def ambiguous(self, name: str) -> bool:
        """Whether several groups with different schemes name the module, so that readers may disagree."""
        found = {repr(self.schemes[g]) for g in self.targets.matches(name)}
        return len(found) > 1 and not self.ignore.matches(name)

    def patterns_for_both(self, some: Collection[str], others: Collection[str]) -> list[str]:
        """Targets that match modules of both kinds."""
        return [
            f"re:{pattern.pattern}"
            for pattern, _ in self.targets.patterns
            if any(map(pattern.match, some)) and any(map(pattern.match, others))
        ]

    def format_of(self, group: int) -> CompressionFormat:
        """Storage format of a group."""
        scheme = self.schemes[group]
        if scheme.format is not None:
            return CompressionFormat(scheme.format)
        stated = self.config.format
        known = {form.value for form in CompressionFormat} - {CompressionFormat.mixed_precision.value}
        if stated in known:
            return CompressionFormat(stated)
        return infer_module_format(torch.nn.Linear, scheme)

    def label(self, group: int | None) -> str:
        """A scheme in words, for messages."""
        if group is None:
            return "plain"
        weights = self.schemes[group].weights
        if weights is None:
            return f"{self.groups[group]} (no weight quantization)"
        size = f" group {weights.group_size}" if weights.group_size and weights.group_size > 0 else ""
        return f"{self.groups[group]} ({weights.num_bits} bit {weights.type}{size})"


def read_schemes(written: Any, findings: Findings) -> Schemes | None:
    """The checkpoint's compressed-tensors schemes; None (with a finding) where there are none to be read.

    :param written: what its config says of stored precisions; None for plain checkpoints
    """
    if written is None:
        return None
    if not isinstance(written, dict):
        findings.error("quant-config-illegal", FIELD, "no JSON object", "restore config.json")
        return None
    method = written.get("quant_method")
    if method != "compressed-tensors":
        findings.warning(
            "quant-method-unknown",
            f"{FIELD}.quant_method",
            f"{method!r} is not compressed-tensors: of its quantized tensors only those of routers were checked",
        )
        return None
    if written.get("sparsity_config"):
        findings.error(
            "quant-sparsity",
            f"{FIELD}.sparsity_config",
            "vLLM no longer reads sparse formats",
            "save densely",
        )
    try:
        config = QuantizationConfig.model_validate(written)
        schemes = Schemes(config, list(config.config_groups), list(config.config_groups.values()))
        for name in config.ignore or []:
            schemes.ignore.add(name, 0)
        for index, scheme in enumerate(schemes.schemes):
            for target in scheme.targets:
                schemes.targets.add(target, index)
            _judge_group(schemes, index, findings)
    except re.error as error:
        findings.error(
            "quant-config-illegal", FIELD, f"{error.pattern!r} is not a regular expression: {error}"
        )
        return None
    except Exception as error:
        findings.error(
            "quant-config-illegal", FIELD, f"compressed-tensors refuses it: {first_line(error)}", "save again"
        )
        return None
    return schemes


def _judge_group(schemes: Schemes, index: int, findings: Findings) -> None:
    subject = f"{FIELD}.config_groups.{schemes.groups[index]}"
    if schemes.format_of(index) is CompressionFormat.dense:
        findings.warning(
            "quant-not-compressed",
            subject,
            "the weights are stored uncompressed (format 'dense'), so nothing is saved",
            "save with save_compressed=True",
        )


def _dtype_name(dtype: torch.dtype) -> str | None:
    return _SAFETENSORS_DTYPE.get(dtype)


class CompressedParameters:
    """Names, shapes and dtypes of the tensors that a compressed Linear is stored as."""

    def __init__(self, schemes: Schemes):
        self._schemes = schemes
        self._of = lru_cache(maxsize=None)(self._compute)

    def of(
        self, in_features: int, out_features: int, bias: bool, group: int
    ) -> dict[str, tuple[tuple[int, ...], str | None]]:
        """Local tensor name -> (shape, safetensors dtype; None: any float).

        Raises:
            ValueError: the scheme cannot be applied to these sizes.
        """
        return self._of(in_features, out_features, bias, group)

    def _compute(
        self, in_features: int, out_features: int, bias: bool, group: int
    ) -> dict[str, tuple[tuple[int, ...], str | None]]:
        try:
            found = compressed_tensors_of(
                in_features, out_features, bias, self._schemes.schemes[group], self._schemes.format_of(group)
            )
        except Exception as error:
            raise ValueError(first_line(error)) from error
        return {name: (shape, _dtype_name(dtype)) for name, (shape, dtype) in found.items()}
