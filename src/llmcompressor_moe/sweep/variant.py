"""Make one point's checkpoint: the drops and schemes that were chosen, applied by the modifiers themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier

from llmcompressor_moe.modifiers import (
    BlockDropModifier,
    ExpertDropModifier,
    LayerDropModifier,
    RouterAwareQuantModifier,
)
from llmcompressor_moe.quantization.schemes import Candidate
from llmcompressor_moe.saving.opened import open_moe
from llmcompressor_moe.sweep.choice import Drops

__all__ = ["make_variant"]


def make_variant(
    model: str | Path,
    drops: Drops,
    schemes: Mapping[int, str],
    candidates: Mapping[str, Candidate],
    output: Path,
) -> None:
    """Write a checkpoint without data: everything has been decided. The base is opened, not loaded: what the point
    leaves as it is goes from file to file.

    :param schemes: block index -> candidate, for every MoE layer that is left; empty: all stay in 16 bit
    :param output: its directory; what it holds besides is the plan of schemes, beside it
    """
    recipe: list[Modifier] = []
    if drops.blocks:
        recipe.append(BlockDropModifier(blocks=drops.blocks))
    if drops.layers:
        recipe.append(LayerDropModifier(layers=drops.layers))
    if drops.experts:
        recipe.append(ExpertDropModifier(experts=drops.experts))
    if schemes:
        plan = output.with_name(f"{output.name}-plan.json")
        plan.write_text(json.dumps(_plan(schemes, candidates)))
        recipe.append(RouterAwareQuantModifier(plan_path=str(plan), servable=False))
    opened = open_moe(model, scratch=output.absolute().parent)
    oneshot(model=opened, recipe=recipe, output_dir=str(output))


def _plan(schemes: Mapping[int, str], candidates: Mapping[str, Candidate]) -> dict:
    return {
        "modifier": RouterAwareQuantModifier.__name__,
        "schemes": {name: candidates[name].written for name in schemes.values()},
        "layers": {str(layer): {"scheme": name} for layer, name in schemes.items()},
    }
