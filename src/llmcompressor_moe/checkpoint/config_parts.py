"""Where a config says what: the part that describes the decoder, and what it says of stored precisions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from llmcompressor_moe.topology import text_config

__all__ = ["QUANTIZATION", "quantization_of", "quantized_parts", "raw_text_config"]

QUANTIZATION = "quantization_config"
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


def raw_text_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the decoder: a nested text config, else the whole."""
    return next((part for part in _nested(raw) if "num_hidden_layers" in part), raw)


def quantization_of(config: PreTrainedConfig | dict[str, Any]) -> Any:
    """What a config says under ``quantization_config``; None where it says nothing.

    :param config: see `quantized_parts`
    """
    return next((part[QUANTIZATION] for part in quantized_parts(config)), None)


def quantized_parts(config: PreTrainedConfig | dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a config that have a ``quantization_config``, the one that readers take first.

    transformers and vLLM look at the whole, and where it has none at the text config, which is where some
    multimodal checkpoints say it.

    :param config: config.json as plain JSON, or as transformers parsed it
    :return: dictionaries that can be changed, of fields or of attributes
    """
    if isinstance(config, dict):
        parts = [config, *_nested(config)]
    else:
        text = text_config(config)
        parts = [vars(config)] if text is config else [vars(config), vars(text)]
    return [part for part in parts if part.get(QUANTIZATION) is not None]


def _nested(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in _TEXT_CONFIGS:
        if isinstance(raw.get(key), dict):
            yield raw[key]
