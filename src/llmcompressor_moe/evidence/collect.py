"""Run a model over calibration data and note everything that drops and schemes are chosen and judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scipy.stats import spearmanr

from llmcompressor_moe.criteria.experts import EXPERT_CRITERIA, ScoreInput
from llmcompressor_moe.evidence.data import Evidence, LayerEvidence
from llmcompressor_moe.profile import Profile, Statistic, collect_profile, divergence_without
from llmcompressor_moe.profile.merging import merged
from llmcompressor_moe.profile.samples import ExpertSample, LayerSample, collect_samples
from llmcompressor_moe.quantization.measure import LayerMeasurement, measure_layer
from llmcompressor_moe.quantization.schemes import Candidate
from llmcompressor_moe.quantization.sensitivity import SensitivityInput, output_error
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["collect_evidence", "require_two"]

_STATISTICS = {Statistic.BLOCK, Statistic.LAYER, Statistic.ROUTING, Statistic.OUTPUT}
# Those that the statistics suffice for.
_CRITERIA = {
    name: criterion
    for name, criterion in EXPERT_CRITERIA.items()
    if criterion.statistics and criterion.statistics <= _STATISTICS
}


def collect_evidence(
    session: TrimSession,
    batches: Sequence[dict[str, Any]],
    candidates: Sequence[Candidate],
    *,
    sample_tokens: int = 256,
    kl_samples: int = 16,
) -> Evidence:
    """Look at an intact model: two passes over the data, and about as many passes over ``kl_samples`` sequences as
    the model has blocks (each block and each MoE layer is left out once; what comes before it is not run again).

    :param session: the model, experts linearized, nothing dropped
    :param batches: at least two, of ``input_ids`` [batch, sequence]
    :param candidates: schemes to try on the experts
    :param sample_tokens: tokens per expert on which they are tried
    :raises ValueError: fewer than two batches
    :raises FloatingPointError: activations are NaN or infinite
    """
    require_two(len(batches))
    model, topology = session.model, session.topology
    halves = [collect_profile(model, topology, part, _STATISTICS) for part in (batches[::2], batches[1::2])]
    whole = merged(*halves)
    layers: dict[int, LayerEvidence] = {}

    def look(layer: int, sample: LayerSample) -> None:
        layers[layer] = _layer(
            layer, whole, sample, measure_layer(session.experts(layer), sample, candidates)
        )

    collect_samples(model, topology, batches, sample_tokens, on_layer_done=look)
    few = _first(batches, kl_samples)
    return Evidence(
        model_type=topology.model_type,
        blocks=len(topology.blocks),
        top_k={index: moe.top_k for index, moe in topology.moe_layers.items()},
        tokens=whole.num_tokens,
        samples=whole.num_samples,
        kl_samples=sum(len(batch["input_ids"]) for batch in few),
        block_similarity=whole.block_similarity,
        layer_similarity=whole.layer_similarity,
        block_divergence=divergence_without(
            model, topology, few, [(block.index,) for block in topology.blocks], "block"
        ),
        layer_divergence=divergence_without(
            model, topology, few, [(index,) for index in topology.moe_layers], "layer"
        ),
        layers=layers,
        stability=_stability(*halves),
        schemes={candidate.name: candidate.written for candidate in candidates},
    )


def require_two(batches: int) -> None:
    """Refuse data that cannot be halved.

    :raises ValueError: see `collect_evidence`
    """
    if batches < 2:
        raise ValueError(
            f"{batches} calibration sample(s): at least two are needed, to tell how stable scores are; give more "
            "text or a lower sequence_length."
        )


def _layer(layer: int, profile: Profile, sample: LayerSample, measurement: LayerMeasurement) -> LayerEvidence:
    return LayerEvidence(
        routed_tokens=measurement.routed_tokens,
        output_power=measurement.output_power,
        lost_power=[_power(work) / max(sample.tokens, 1) for work in sample.experts],
        errors=output_error(SensitivityInput(measurement, {}, layer, 0)),
        scores=_scores(profile, layer),
    )


def _power(work: ExpertSample) -> float:
    """Sum over all routed tokens of ||g f(x)||^2, from the kept ones and the squared weights of all."""
    squared = work.weights.double().square()
    total = float(squared.sum())
    kept = float((squared * work.outputs.double().square().sum(dim=-1)).sum()) if len(squared) else 0.0
    return kept / total * work.squared_weight if total else 0.0


def _scores(profile: Profile, layer: int) -> dict[str, list[float | None]]:
    return {
        name: criterion.score(
            ScoreInput(
                profile=profile.experts[layer],
                num_samples=profile.num_samples,
                num_experts=len(profile.experts[layer].routed_tokens),
                weights=(),
                layer=layer,
                seed=0,
            )
        )
        for name, criterion in _CRITERIA.items()
    }


def _stability(first: Profile, second: Profile) -> dict[str, float | None]:
    """Spearman's rank correlation between the halves; experts are ranked over all layers together."""
    found = {
        "block similarity": _rank_correlation(
            list(first.block_similarity.values()), list(second.block_similarity.values())
        ),
        "layer similarity": _rank_correlation(
            list(first.layer_similarity.values()), list(second.layer_similarity.values())
        ),
    }
    for name in _CRITERIA:
        pairs = [
            (a, b)
            for layer in first.experts
            for a, b in zip(_scores(first, layer)[name], _scores(second, layer)[name], strict=True)
            if a is not None and b is not None
        ]
        found[name] = _rank_correlation([a for a, _ in pairs], [b for _, b in pairs])
    return found


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def _first(batches: Sequence[dict[str, Any]], sequences: int) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = []
    for batch in batches:
        if sum(len(b["input_ids"]) for b in taken) >= sequences:
            break
        taken.append(batch)
    return taken
