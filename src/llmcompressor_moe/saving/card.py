"""The model card: what was done to which model, with the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from llmcompressor_moe.architectures import is_brought
from llmcompressor_moe.report import ModifierReport, shown_path
from llmcompressor_moe.surgery.config import per_layer_overrides

__all__ = ["write_model_card"]


def write_model_card(
    directory: Path,
    config: PreTrainedConfig,
    history: Sequence[ModifierReport],
    recipe: str,
    *,
    quantized_experts: bool,
    research: bool,
    mtp: str = "",
) -> None:
    """Write README.md into a checkpoint directory.

    :param history: what each modifier did, in order
    :param recipe: the recipe as YAML
    :param quantized_experts: whether experts are stored compressed
    :param mtp: what became of multi-token-prediction layers
    :param research: vLLM cannot serve this checkpoint, and its user asked for it nevertheless
    """
    base = shown_path(history[0].base_model) if history else ""
    uniform = not per_layer_overrides(config)
    name = Path(base).name or "a Mixture-of-Experts model"
    lines = ["---"]
    if "/" in base:
        lines += [f"base_model: {base}"]
    lines += [
        "library_name: transformers",
        "tags:",
        "- mixture-of-experts",
        "- llmcompressor",
        "- compressed",
        "---",
        "",
    ]
    lines += [f"# {name}, compressed", ""]
    lines += [
        f"Made from `{base or name}` with llm-compressor and llmcompressor-moe.",
        "",
        "## What was done",
        "",
    ]
    lines += [f"- {report.describe()}" for report in history]
    lines += [f"- {mtp}"] if mtp else []
    lines += [
        "",
        "`trimming.json` holds the scores and the original indices of everything that stayed.",
        "",
        "## Loading",
        "",
    ]
    if research:
        lines += [
            "For research: vLLM cannot serve it (schemes that it has no method for, or several in a layer).",
            "In transformers load it inside `llmcompressor_moe.load_trimmed_moe()`.",
        ]
    elif uniform and is_brought(config.model_type):
        lines += [
            f"vLLM and transformers have no class for configs of model_type `{config.model_type}`:",
            "",
            "- vLLM: install `llmcompressor-moe-vllm` beside it; nothing else changes.",
            "- transformers: `with llmcompressor_moe.load_trimmed_moe(): "
            "AutoModelForCausalLM.from_pretrained(...)`.",
        ]
    elif uniform and quantized_experts:
        lines += [
            "vLLM loads it as it loads the base model. In transformers load it inside "
            "`llmcompressor_moe.load_trimmed_moe()`: alone it decompresses all experts by one scheme."
        ]
    elif uniform:
        lines += ["A plain checkpoint: transformers and vLLM load it as they load the base model."]
    else:
        lines += [
            "Layers differ (`per_layer_config` in config.json), so readers need to know:",
            "",
            "- vLLM: install `llmcompressor-moe-vllm` beside it; nothing else changes.",
            "- transformers: `with llmcompressor_moe.load_trimmed_moe(): "
            "AutoModelForCausalLM.from_pretrained(...)`.",
            "",
            "Without them, loading ends with an error rather than with random weights.",
        ]
    if recipe:
        lines += ["", "## Recipe", "", "```yaml", recipe.strip(), "```"]
    (directory / "README.md").write_text("\n".join(lines) + "\n")
