"""criterion="reap" drops the experts that upstream's REAPPruningModifier drops on the same data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier

from llmcompressor_moe import ExpertDropModifier


def kept_by_upstream(path: Path, report: Path, **options) -> dict[int, list[int]]:
    recipe = REAPPruningModifier(sparsity=0.375, report_path=str(report))
    support.trim(support.load(path), recipe, **options)
    return {int(name.split(".")[2]): experts for name, experts in json.loads(report.read_text()).items()}


def kept_by_us(path: Path, report: Path) -> dict[int, list[int]]:
    recipe = ExpertDropModifier(num_drop=3, criterion="reap", report_path=str(report))
    support.trim(support.load(path), recipe, pipeline="independent")
    return {int(layer): experts for layer, experts in json.loads(report.read_text())["kept"].items()}


# Upstream calibrates the first two in its basic pipeline here: its tracing (sequential pipeline) leaves out the
# causal mask of models that choose their mask function at run time, so that attention sees the future there.
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mixtral", {"pipeline": "basic"}),
        ("qwen3_moe", {"pipeline": "basic"}),
        # Without `propagate_error=False` a layer sees what the already pruned layers before it give; REAP is
        # defined on the intact model.
        ("qwen2_moe", {"pipeline": "independent", "propagate_error": False}),
        ("olmoe", {"pipeline": "independent", "propagate_error": False}),
    ],
)
def test_same_experts_as_upstream(model_type: str, options: dict, tmp_path: Path) -> None:
    path = support.saved(model_type, tmp_path)
    ours = kept_by_us(path, tmp_path / "ours.json")
    assert ours == kept_by_upstream(path, tmp_path / "theirs.json", **options)
    assert len(ours) == 4 and all(len(experts) == 5 for experts in ours.values())
