"""Sweep reports of any size, with made-up numbers that fit together."""

import math
import random

from llmcompressor_moe.evaluation.agreement import Agreement
from llmcompressor_moe.evaluation.cost import DecodeBytes, ModelCost
from llmcompressor_moe.evaluation.report import BaseEvaluation, CompressedEvaluation
from llmcompressor_moe.evaluation.routing import LayerRouting, RoutingComparison, RoutingSummary
from llmcompressor_moe.evaluation.text import TextQuality
from llmcompressor_moe.evidence.data import Evidence, LayerEvidence
from llmcompressor_moe.routing.fidelity import RoutingFidelity
from llmcompressor_moe.sweep.choice import Drops
from llmcompressor_moe.sweep.grid import Grid, Point
from llmcompressor_moe.sweep.report import PointResult, SweepReport

POINTS = [
    Point(layers=1),
    Point(blocks=1),
    Point(blocks=1, bits=5),
    Point(experts=1),
    Point(experts=2, layers=1),
    Point(bits=4.5),
    Point(bits=6.5),
]


def sweep_report(
    blocks: int = 6,
    experts: int = 8,
    points: list[Point] = POINTS,
    model: str = "models/made-up",
    dense: int = 1,
    worst: float = 2.0,
) -> SweepReport:
    """The first ``dense`` blocks have no MoE layer; perplexity grows up to ``worst`` times the base's."""
    draw = random.Random(0)
    moe = range(dense, blocks)
    evidence = Evidence(
        model_type="mixtral",
        blocks=blocks,
        top_k=dict.fromkeys(moe, 2),
        tokens=4096,
        samples=16,
        kl_samples=4,
        block_similarity={block: draw.uniform(0.7, 1) for block in range(blocks)},
        layer_similarity={block: draw.uniform(0.7, 1) for block in moe},
        block_divergence={block: draw.uniform(0.01, 1) for block in range(blocks)},
        layer_divergence={block: draw.uniform(0.01, 1) for block in moe},
        layers={
            block: LayerEvidence(
                routed_tokens=[0 if draw.random() < 0.03 else draw.randrange(1, 900) for _ in range(experts)],
                output_power=1.0,
                lost_power=[1.0] * experts,
                errors={},
                scores={},
            )
            for block in moe
        },
        stability={"block similarity": 1.0, "reap": 0.913, "frequency": None},
    )
    before = {block: _shares([draw.lognormvariate(0, 0.6) for _ in range(experts)]) for block in moe}
    base = BaseEvaluation(path=model, text=_text(28.0), cost=_cost(model, 8_000_000))
    results = [PointResult(point=Point(), dropped=Drops(), schemes={}, size=8_030_000, found=None)]
    for number, point in enumerate(points, start=1):
        drops = Drops(
            list(range(1, 1 + point.blocks)),
            list(range(blocks - point.layers, blocks)),
            {
                block: sorted(draw.sample(range(experts), point.experts))
                for block in range(max(dense, 1 + point.blocks), blocks - point.layers)
                if point.experts
            },
        )
        size = int(8_030_000 * (1 - 0.5 * number / len(points)))
        perplexity = 28.0 * (1 + (worst - 1) * draw.random())
        results.append(_result(point, drops, before, size, perplexity, draw))
    return SweepReport(
        model=model,
        grid=Grid(points=[{}]),
        evidence=evidence,
        source="made up",
        base=base,
        points=results,
    )


def _shares(loads: list[float]) -> list[float]:
    return [round(load / sum(loads), 6) if sum(loads) else 0.0 for load in loads]


def _text(perplexity: float) -> TextQuality:
    nll = math.log(perplexity)
    return TextQuality(
        documents=6,
        tokens=4000,
        nbytes=13000,
        length=256,
        stride=128,
        mean_nll=nll,
        perplexity=perplexity,
        bits_per_byte=nll * 4000 / 13000 / math.log(2),
    )


def _cost(path: str, size: int) -> ModelCost:
    return ModelCost(
        path=path,
        nbytes=size,
        header_nbytes=30_000,
        parameters=size // 2,
        active_parameters=size // 5,
        parts=[],
        linear_flops=size,
        attention=[],
        experts=[],
        weight_nbytes=size // 4,
        row_nbytes=256,
        kv_itemsize=2,
        flops=[],
        decode=[DecodeBytes(batch=1, context=1024, weights=size / 4, experts=size / 8, kv_cache=2e6)],
        notes=[],
    )


def _result(
    point: Point,
    drops: Drops,
    before: dict[int, list[float]],
    size: int,
    perplexity: float,
    draw: random.Random,
) -> PointResult:
    layers = {}
    for position, (block, shares) in enumerate(before.items()):
        if block in drops.blocks or block in drops.layers:
            continue
        gone = drops.experts.get(block, [])
        loads = [
            0.0 if expert in gone or draw.random() < 0.01 else share * draw.uniform(0.8, 1.2)
            for expert, share in enumerate(shares)
        ]
        fidelity = RoutingFidelity(
            top_k_overlap=0.8,
            top_k_overlap_kept=0.9,
            replaced=0.01,
            router_kl=0.02,
            load_change=0.1,
            load_cv_before=0.3,
            load_cv_after=0.35,
            dead_before=0,
            dead_after=sum(load == 0 for load in loads) - len(gone),
            utilization_before=shares,
            utilization_after=_shares(loads),
        )
        kept = [expert for expert in range(len(shares)) if expert not in gone]
        layers[block] = LayerRouting(compressed_block=position, kept_experts=kept, routing=fidelity)
    mean = RoutingSummary(
        layers=len(layers),
        top_k_overlap=0.8,
        top_k_overlap_kept=0.9,
        replaced=0.01,
        router_kl=0.02,
        load_change=0.1,
        load_cv_before=0.3,
        load_cv_after=0.35,
        dead_before=0,
        dead_after=0,
    )
    found = CompressedEvaluation(
        path=point.name,
        text=_text(perplexity),
        cost=_cost(point.name, size),
        agreement=Agreement(
            tokens=4000,
            vocabulary=2048,
            length=256,
            stride=128,
            mean_kl=0.1 * draw.random(),
            median_kl=0.01,
            kl_90=0.2,
            kl_99=0.8,
            top1_agreement=draw.uniform(0.6, 0.95),
        ),
        routing=RoutingComparison(
            tokens=4096,
            dropped_blocks=drops.blocks,
            dropped_layers=drops.layers,
            dropped_experts=drops.experts,
            layers=layers,
            mean=mean,
        ),
    )
    schemes = dict.fromkeys(layers, "W4A16") if point.bits is not None else {}
    return PointResult(point=point, dropped=drops, schemes=schemes, size=size, found=found)
