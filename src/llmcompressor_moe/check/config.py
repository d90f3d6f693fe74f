"""Reads config.json twice: as plain JSON, to judge what is written, and as transformers understands it.

Nothing is fetched and no code of the checkpoint is run.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.checkpoint.config_parts import (
    QUANTIZATION,
    quantization_of,
    quantized_parts,
    raw_text_config,
)
from llmcompressor_moe.checkpoint.layout import read_json
from llmcompressor_moe.compat.transformers.per_layer import general_value
from llmcompressor_moe.topology import expert_count_attributes, text_config

CONFIG_NAME = "config.json"
_MODELOPT_NAME = "hf_quant_config.json"

# Beyond these a config is taken for damaged: laying out such a model would not end.
MAX_LAYERS = 2_000
MAX_EXPERTS = 16_384
MAX_SIZE = 2**31


@dataclass(frozen=True)
class ReadConfig:
    """config.json as written (`raw`; `raw_text`: the part that describes the decoder) and as parsed."""

    raw: dict[str, Any]
    raw_text: dict[str, Any]
    parsed: PreTrainedConfig

    @property
    def text(self) -> PreTrainedConfig:
        """The parsed config of the decoder."""
        return text_config(self.parsed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the config names. Checkpoints that were released quantized may name none; what they do
        not quantize is bfloat16.
        """
        named = self.parsed.dtype or self.text.dtype
        if named is not None:
            return named
        return torch.bfloat16 if self.quantization else torch.get_default_dtype()

    @property
    def quantization(self) -> Any:
        """What is written of stored precisions, wherever readers look for it; None for plain checkpoints."""
        return quantization_of(self.raw)

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks that the config names."""
        return int(self.text.num_hidden_layers)

    @property
    def expert_attribute(self) -> str | None:
        """Canonical name of the attribute that counts routed experts; None for a dense model."""
        names = expert_count_attributes(self.parsed)
        return names[0] if names else None

    def layer(self, index: int) -> PreTrainedConfig:
        """The decoder's config as block `index` resolves it."""
        return self.text.per_layer_config[index] if 0 <= index < self.num_layers else self.text

    def value(self, name: str, default: Any = None) -> Any:
        """The global value of an attribute, whether or not layers override it."""
        return general_value(self.text, name, default)


def read_raw_config(path: Path, findings: Findings) -> dict[str, Any] | None:
    """config.json as plain JSON, or None with a finding."""
    file = path / CONFIG_NAME
    try:
        raw = read_json(file)
    except FileNotFoundError:
        findings.error("config-missing", CONFIG_NAME, "not there", "save the model with its config")
        return None
    except (ValueError, OSError) as error:
        findings.error("config-unreadable", CONFIG_NAME, str(error), "restore it from the base model's")
        return None
    if not isinstance(raw, dict):
        findings.error("config-unreadable", CONFIG_NAME, f"holds a {type(raw).__name__}, no JSON object")
        return None
    if not quantized_parts(raw):
        # ModelOpt wrote it into a file of its own, where vLLM still looks
        with contextlib.suppress(OSError, ValueError):
            beside = read_json(path / _MODELOPT_NAME)
            if isinstance(beside, dict):
                raw[QUANTIZATION] = {"quant_method": "modelopt", **beside}
    return raw


def implausible(raw: dict[str, Any], findings: Findings) -> bool:
    """Whether a number in the config is beyond any model, so that laying it out would not end."""
    bad = False

    def walk(value: Any, name: str) -> None:
        nonlocal bad
        if isinstance(value, dict):
            for key, inner in value.items():
                if key != QUANTIZATION:
                    walk(inner, f"{name}.{key}" if name else str(key))
            return
        if not isinstance(value, int) or isinstance(value, bool):
            return
        leaf = name.rsplit(".", 1)[-1]
        limit = MAX_SIZE
        if "experts" in leaf:
            limit = MAX_EXPERTS
        elif leaf in ("num_hidden_layers", "num_layers", "n_layer"):
            limit = MAX_LAYERS
        counts = leaf.startswith(("num_", "n_")) or leaf.endswith("_size")
        if abs(value) > limit and (counts or "experts" in leaf):
            bad = True
            findings.error("config-implausible", name, f"{value} is more than {limit}", "restore config.json")
        elif value < 0 and leaf in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"):
            bad = True
            findings.error("config-implausible", name, f"{value} is negative", "restore config.json")

    walk(raw, "")
    return bad


def parse_config(path: Path, raw: dict[str, Any], findings: Findings) -> ReadConfig | None:
    """config.json as transformers parses it, running no code of the checkpoint; None with a finding."""
    try:
        parsed = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        config = ReadConfig(raw, raw_text_config(raw), parsed)
        _ = config.num_layers
    except Exception as error:
        if "auto_map" in raw:
            findings.error(
                "needs-remote-code",
                "auto_map",
                f"model_type {raw.get('model_type')!r} needs code that comes with the checkpoint, which is "
                "never run here",
                "use an architecture that transformers has, or check the checkpoint by loading it",
            )
        else:
            findings.error("config-illegal", CONFIG_NAME, f"transformers refuses it: {first_line(error)}")
        return None
    if "auto_map" in raw:
        findings.note(
            "remote-code",
            "auto_map",
            f"the checkpoint brings code, which was not run; {type(parsed).__name__} and its model were used",
        )
    return config


def first_line(error: BaseException) -> str:
    """Type and first lines of an exception's text, as one line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:400]
