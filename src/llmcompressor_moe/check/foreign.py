"""Routers in formats other than compressed-tensors: GPTQ, AWQ, FP8, ModelOpt, bitsandbytes and their like.

Tensors of these formats are not compared with a demand. But every reader runs routers plain, or as the config
says, and both follow from names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from llmcompressor_moe.check.comparison import kind_of
from llmcompressor_moe.check.expected import ExpectedModel, LinearSite
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.check.schemes import FIELD, is_compressed
from llmcompressor_moe.checkpoint.layout import CheckpointLayout
from llmcompressor_moe.families import exception_for

__all__ = ["check_foreign_routers", "foreign_method"]

# Fields in which a quantization config lists modules that stay plain, in any format.
_LISTS = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "exclude_modules",
    "exclude",
    "llm_int8_skip_modules",
)
# Where users of a format say so, for messages.
_FIELDS = {
    "gptq": "dynamic ({'-:.*gate$': {}})",
    "modelopt": "ignore (exclude_modules in hf_quant_config.json)",
    "bitsandbytes": "llm_int8_skip_modules",
}
# Formats in which readers quantize what the config does not leave out, whatever the files hold.
_CONFIG_DECIDES = ("fp8", "fbgemm_fp8", "modelopt", "bitsandbytes")


def foreign_method(quantization: dict[str, Any]) -> str:
    """Family of a ``quant_method``: ``modelopt`` for ``modelopt_fp4``, ``gptq`` for ``gptq_marlin``."""
    producer = quantization.get("producer")
    method = quantization.get("quant_method") or (producer.get("name") if isinstance(producer, dict) else "")
    method = str(method).lower()
    return next((name for name in ("gptq", "awq", "modelopt", "bitsandbytes") if name in method), method)


def check_foreign_routers(
    expected: ExpectedModel, quantization: dict[str, Any], layout: CheckpointLayout, findings: Findings
) -> None:
    """Routers and gates of shared experts are stored plain, and readers know it.

    :param quantization: what config.json says under `FIELD`
    """
    method = foreign_method(quantization)
    field = _FIELDS.get(method, "modules_to_not_convert")
    follows = exception_for(expected.model.config.get_text_config().model_type).router_follows_config
    quantized: dict[tuple[str, str], list[str]] = {}
    misread: dict[tuple[str, str, str], list[str]] = {}
    for site in expected.sites.values():
        if site.kind not in ("router", "gate"):
            continue
        stored = next((name for name in (site.name, site.runtime) if is_compressed(layout, name)), None)
        kind = kind_of(f"{site.name}.")
        if stored is not None:
            quantized.setdefault((site.kind, kind), []).append(stored)
        elif not _left_plain(quantization, (site.name, site.runtime)):
            for reader in _readers(method, quantization, site, follows):
                misread.setdefault((site.kind, kind, reader), []).append(site.name)
    for (what, _), names in quantized.items():
        findings.error(
            "router-quantized",
            names[0],
            f"a {what} is stored quantized ({len(names)} modules alike); readers run it plain",
            f"quantize again with the routers and shared-expert gates in {field}",
        )
    for (what, _, reader), names in misread.items():
        findings.error(
            "router-not-ignored",
            names[0],
            f"a {what} is stored plain ({len(names)} modules alike), but {reader} quantizes it, because {FIELD} "
            "does not leave it out",
            f"add the names of all {what}s to {field} in {FIELD}",
        )


def _readers(
    method: str, quantization: dict[str, Any], site: LinearSite, router_follows_config: bool
) -> Iterable[str]:
    """Readers that quantize a module which the config does not leave out."""
    listed = method == "awq" and bool(quantization.get("modules_to_not_convert"))
    # Where AWQ lists nothing, vLLM looks into the files; as it always does for GPTQ.
    if router_follows_config and site.kind == "router" and (method in _CONFIG_DECIDES or listed):
        yield "vLLM"
    # transformers does not read ModelOpt; it quantizes nothing but nn.Linear, which most routers are not.
    if site.classes[0] == "Linear" and method in ("fp8", "bitsandbytes", "awq"):
        yield "transformers"


def _left_plain(quantization: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether a config leaves a module out under one of its names, by any of the ways in which readers match."""
    nested = quantization.get("quantization")
    sections = [quantization, *([nested] if isinstance(nested, dict) else [])]
    listed = [
        entry for section in sections for field in _LISTS for entry in _strings(section.get(field)) if entry
    ]
    excluded = [
        entry.removeprefix("-:") for entry in _strings(quantization.get("dynamic")) if entry.startswith("-:")
    ]
    return any(
        any(_names(entry, name) for entry in listed) or any(_matches(entry, name) for entry in excluded)
        for name in names
    )


def _strings(value: Any) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list | dict) else []


def _names(entry: str, name: str) -> bool:
    """Part of a name, a wildcard, or a pattern."""
    if entry.startswith("re:"):
        return _matches(entry.removeprefix("re:"), name)
    return entry in name or fnmatch(name, entry) or _matches(entry, name)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False
