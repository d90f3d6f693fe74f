"""Our modifiers with each other and with upstream's, in any order, under both pipelines: run, check, reload
equal.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import support
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
from llmcompressor_moe.check import check_checkpoint

EXPERTS = r"re:.*experts\.\d+\.(gate|up|down)_proj$"


def w4a16() -> dict[str, QuantizationScheme]:
    weights = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    return {"experts": QuantizationScheme(targets=[EXPERTS], weights=weights)}


UPSTREAM: dict[str, Callable[[], object]] = {
    "quantization": lambda: QuantizationModifier(config_groups=w4a16(), ignore=["lm_head"]),
    "gptq": lambda: GPTQModifier(config_groups=w4a16(), ignore=["lm_head"], block_size=32),
    "sparsegpt": lambda: SparseGPTModifier(
        sparsity=0.5, mask_structure="2:4", targets=[EXPERTS], block_size=32
    ),
    "wanda": lambda: WandaPruningModifier(sparsity=0.5, mask_structure="2:4", targets=[EXPERTS]),
    "reap": lambda: REAPPruningModifier(sparsity=0.25),
}
OURS: dict[str, Callable[[], object]] = {
    "layer": lambda: LayerDropModifier(num_drop=1),
    "block": lambda: BlockDropModifier(num_drop=1),
    "expert": lambda: ExpertDropModifier(num_drop=2),
}
ORDERS = [
    ("layer", "block", "expert"),
    ("expert", "block", "layer"),
    ("block", "expert", "layer"),
    *[(ours, upstream) for ours in OURS for upstream in UPSTREAM],
    *[(upstream, ours) for ours in OURS for upstream in UPSTREAM],
    ("layer", "block", "expert", "gptq"),
    ("layer", "reap", "expert", "quantization"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.saved("mixtral", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_any_order(base: Path, tmp_path: Path, order: tuple[str, ...], pipeline: str) -> None:
    out = tmp_path / "out"
    recipe = [{**OURS, **UPSTREAM}[name]() for name in order]
    model = support.trim(support.load(base), recipe, pipeline=pipeline, output_dir=str(out))
    check_checkpoint(out).raise_if_errors()
    expected = support.logits(model)
    reloaded = support.load(out)
    assert torch.isfinite(expected).all()
    tolerance = 1e-5
    torch.testing.assert_close(support.logits(reloaded), expected, atol=tolerance, rtol=0)
    blocks = 4 - ("block" in order)
    assert reloaded.config.num_hidden_layers == blocks
