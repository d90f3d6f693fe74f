"""One of several ranks that trim a model together, for test_ranks.py."""

from __future__ import annotations

import json
from pathlib import Path

import support
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import distributed as dist

from llmcompressor_moe import (
    BlockDropModifier,
    ExpertDropModifier,
    LayerDropModifier,
    RouterCalibrationModifier,
    open_moe,
)
from llmcompressor_moe.profile.changes import WithoutExperts
from llmcompressor_moe.profile.variants import Variant, divergence_of
from llmcompressor_moe.quantization.planner import Planner, QuantSettings
from llmcompressor_moe.quantization.schemes import resolve_schemes
from llmcompressor_moe.surgery.experts import routing_parts
from llmcompressor_moe.surgery.session import TrimSession


def plan_of(base: Path, ids: torch.Tensor) -> dict:
    """What a RouterAwareQuantModifier would choose, and why."""
    session = TrimSession.begin(linearize_moe(support.load(base)))
    settings = QuantSettings(
        candidates=resolve_schemes(["W4A16", "W8A16"], 32, "schemes"),
        attention=None,
        dense=None,
        target_bits=7.0,
        target_size=None,
        per_expert=False,
        ignore=["lm_head"],
        sensitivity="output_error",
        sample_tokens=10_000,
        seed=0,
    )
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    decided = Planner(session, settings).plan(batches, set())
    layers = {index: plan.model_dump() for index, plan in decided["layers"].items()}
    return {"layers": layers, "calibration": decided["calibration"]}


def curves_of(base: Path, ids: torch.Tensor) -> dict:
    """What the output loses with the first experts of each layer."""
    session = TrimSession.begin(linearize_moe(support.load(base)))
    variants = [
        Variant(layer, WithoutExperts(routing_parts(session.model, session.layer(layer)), range(3, 8)))
        for layer in session.layers
    ]
    nats, tokens = divergence_of(session.model, [{"input_ids": row[None]} for row in ids], variants)
    return {"nats": nats, "tokens": tokens}


def calibrated(base: Path, ids: torch.Tensor) -> dict:
    """What router calibration made of routers, norms and experts."""
    drop = ExpertDropModifier(experts={0: [0, 1], 2: [3]})
    fit = RouterCalibrationModifier(
        objective="layer", parts=["router", "norms", "scales"], learning_rate=0.02
    )
    model = support.trim(support.load(base), [drop, fit], ids=ids)
    sums = {name: value.double().sum().item() for name, value in model.named_parameters()}
    report = model._trim_history[-1]
    return {"sums": sums, "report": report.model_dump(mode="json", exclude={"settings"})}


def trimmed(base: Path, ids: torch.Tensor, out: Path) -> None:
    """Writes the checkpoint to OUT and each modifier's report beside it."""
    recipe = [
        LayerDropModifier(num_drop=1, report_path=f"{out}-layer.json"),
        BlockDropModifier(num_drop=1, metric="kl", report_path=f"{out}-block.json"),
        ExpertDropModifier(num_drop=2, criterion="reap", report_path=f"{out}-expert.json"),
    ]
    support.trim(support.load(base), recipe, ids=ids, output_dir=str(out))


def opened(base: Path, ids: torch.Tensor, out: Path) -> None:
    """The same without loading the model, with its experts quantized as well: ranks share the work."""
    recipe = [
        LayerDropModifier(num_drop=1),
        ExpertDropModifier(num_drop=2, criterion="reap"),
        GPTQModifier(targets=["re:.*experts.*_proj$"], scheme="W8A8"),
    ]
    support.trim(open_moe(base), recipe, ids=ids, output_dir=str(out))


def main(base: Path, out: Path, kind: str) -> None:
    """Trim the model, or write what a rank would ``plan``, ``calibrate`` or measure (``curves``) to
    OUT-RANK.json.
    """
    ids, rank = support.token_ids(), 0
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        # Each rank brings its own part of the data, as upstream asks for.
        ids = ids.chunk(dist.get_world_size())[rank]
    if kind == "trim":
        trimmed(base, ids, out)
        opened(base, ids, Path(f"{out}-opened"))
    else:
        # On a CPU upstream shares weights between ranks in memory that it lays out itself; the plan needs none.
        found = {"plan": plan_of, "calibrate": calibrated, "curves": curves_of}[kind](base, ids)
        Path(f"{out}-{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()
