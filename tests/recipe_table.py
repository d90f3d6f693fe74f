"""What the recipes for real models leave, computed from their public configs, for docs/recipes.md.

    python tests/recipe_table.py            # rewrites the tables of docs/recipes.md

`test_real_models.py` fails when the page is out of date.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import llmcompressor_moe  # noqa: F401  (recipes name its modifiers)
from llmcompressor_moe.forecast import forecast
from llmcompressor_moe.inspection import inspect_model
from llmcompressor_moe.recipe_file import read_recipe
from llmcompressor_moe.sizes import bytes_text, count_text

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "recipes.md"
CONFIGS = Path(__file__).parent / "data" / "configs"

# GPU memory in 10^9 bytes; the share of it that vLLM takes by default; room for the KV cache and activations.
CARDS = (6, 8, 12, 16, 24, 48, 80)
TAKEN = 0.92
ROOM = 2 * 2**30

_TABLE = re.compile(r"(<!-- sizes: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class RealModel:
    """A public model, the recipe for it, and a scheme to compare with: its experts in that, nothing dropped."""

    config: str
    recipe: str
    alone: str
    alone_is: str


MODELS = (
    RealModel("Mixtral-8x7B-v0.1", "mixtral-8x7b-trim-and-slim", "W4A16", "experts W4A16, nothing dropped"),
    RealModel("Qwen3-30B-A3B", "qwen3-30b-a3b-trim-and-slim", "W4A16", "experts W4A16, nothing dropped"),
    RealModel(
        "DeepSeek-V2-Lite", "deepseek-v2-lite-trim-and-slim", "W4A16", "experts W4A16, nothing dropped"
    ),
    RealModel("OLMoE-1B-7B-0924", "olmoe-1b-7b-trim-and-slim", "W4A16", "experts W4A16, nothing dropped"),
    RealModel("gpt-oss-20b", "gpt-oss-20b-trim", "MXFP4A16", "as published, experts in MXFP4"),
)


def fits(nbytes: int) -> str:
    """The smallest card, or number of the largest, that holds weights of this size."""
    for card in CARDS:
        if nbytes + ROOM <= TAKEN * card * 10**9:
            return f"{card} GB"
    count = next(n for n in range(2, 99) if nbytes / n + ROOM <= TAKEN * CARDS[-1] * 10**9)
    return f"{count} x {CARDS[-1]} GB"


def table(model: RealModel) -> str:
    """The Markdown table of one model."""
    inspection = inspect_model(CONFIGS / model.config, [model.alone])
    (alone,) = inspection.schemes
    steps = forecast(CONFIGS / model.config, read_recipe(ROOT / "recipes" / f"{model.recipe}.yaml"))
    rows = [
        _row(steps[0].step, steps[0].parameters, steps[0].active_parameters, steps[0].bits, steps[0].nbytes)
    ]
    rows.append(
        _row(
            model.alone_is,
            inspection.parameters,
            inspection.active_parameters,
            alone.bits,
            inspection.nbytes_in(alone),
        )
    )
    rows += [
        _row(step.step, step.parameters, step.active_parameters, step.bits, step.nbytes, step.at_most)
        for step in steps[1:]
    ]
    columns = ("step", "parameters", "active per token", "bits per expert weight", "size", "fits on")
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]) + "\n"


def _row(step: str, parameters: int, active: int, bits: float, nbytes: int, at_most: bool = False) -> str:
    limit = "at most " if at_most else ""
    cells = (
        step,
        count_text(parameters),
        count_text(active),
        f"{limit}{bits:.4g}",
        f"{limit}{bytes_text(nbytes)}",
        fits(nbytes),
    )
    return f"| {' | '.join(cells)} |"


def updated(text: str) -> str:
    """The page with every table as it has to be; raises KeyError for a model that there is none of."""
    models = {model.config: model for model in MODELS}
    return _TABLE.sub(lambda match: f"{match[1]}\n{table(models[match[2]])}\n{match[3]}", text)


def tables_in(text: str) -> list[str]:
    """Configs whose table the page has."""
    return [match[2] for match in _TABLE.finditer(text)]


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text()))
