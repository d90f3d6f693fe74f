"""Evidence of one calibration run, against plain hooks and passes over all data at once."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from scipy.stats import spearmanr

from llmcompressor_moe.evidence import Evidence, collect_evidence
from llmcompressor_moe.profile import Profile, Statistic, collect_profile
from llmcompressor_moe.profile.merging import merged
from llmcompressor_moe.quantization.schemes import resolve_schemes
from llmcompressor_moe.surgery.session import TrimSession

STATISTICS = {Statistic.BLOCK, Statistic.LAYER, Statistic.ROUTING, Statistic.OUTPUT}


def batches() -> list[dict[str, torch.Tensor]]:
    ids = support.token_ids()
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrimSession:
    path: Path = support.saved(request.param, tmp_path_factory.mktemp("evidence"))
    return TrimSession.begin(linearize_moe(support.load(path)))


@pytest.fixture(scope="module")
def evidence(session: TrimSession) -> Evidence:
    candidates = resolve_schemes(["W4A16", "W8A16", "UNQUANTIZED"], 32, "schemes")
    return collect_evidence(session, batches(), candidates, sample_tokens=10_000, kl_samples=4)


def profile(session: TrimSession, given: list[dict[str, torch.Tensor]]) -> Profile:
    return collect_profile(session.model, session.topology, given, STATISTICS)


def test_two_halves_make_the_whole(session: TrimSession) -> None:
    every = batches()
    whole, both = profile(session, every), merged(profile(session, every[:3]), profile(session, every[3:]))
    for ours, theirs in zip(_numbers(both.model_dump()), _numbers(whole.model_dump()), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value, key=str) for number in _numbers(value[key])]
    if isinstance(value, list):
        return [number for entry in value for number in _numbers(entry)]
    return [] if value is None else [float(value)]


def test_similarities_of_outputs_cannot_be_merged(session: TrimSession) -> None:
    first = profile(session, batches()[:1])
    with pytest.raises(ValueError, match="different models"):
        merged(first, first.model_copy(update={"experts": {}}))
    layer = next(iter(first.experts.values()))
    layer.output_similarity = [[1.0]]
    with pytest.raises(ValueError, match="cannot be added up"):
        merged(first, first)


def test_lost_power_is_what_hooks_see(session: TrimSession, evidence: Evidence) -> None:
    """E over tokens of ||g f(x)||^2 per expert, from stock modules' inputs and outputs."""
    sums: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    tokens = 0
    inputs: dict[int, Any] = {}
    handles = []
    for index, moe in session.topology.moe_layers.items():
        experts = session.model.get_submodule(moe.experts)
        handles.append(
            experts.register_forward_pre_hook(lambda _, args, index=index: inputs.__setitem__(index, args))
        )
    with torch.no_grad():
        for batch in batches():
            session.model(**batch)
            tokens += batch["input_ids"].numel()
            for index, (hidden, chosen, weights) in inputs.items():
                flat = hidden.reshape(-1, hidden.shape[-1])
                for expert, module in enumerate(session.experts(index)):
                    gates = (weights * (chosen == expert)).sum(-1, keepdim=True).double()
                    sums[index][expert] += float((gates * module(flat).double()).square().sum())
    for handle in handles:
        handle.remove()
    for index, layer in evidence.layers.items():
        expected = [sums[index][expert] / tokens for expert in range(len(layer.lost_power))]
        assert layer.lost_power == pytest.approx(expected, rel=1e-4)


def test_evidence_says_what_it_rests_on(session: TrimSession, evidence: Evidence) -> None:
    assert (evidence.tokens, evidence.samples, evidence.kl_samples) == (8 * 24, 8, 4)
    assert evidence.blocks == len(session.topology.blocks)
    assert set(evidence.layers) == set(session.layers) == set(evidence.layer_divergence)
    assert set(evidence.block_divergence) == set(range(evidence.blocks))
    for index, layer in evidence.layers.items():
        assert sum(layer.routed_tokens) == evidence.tokens * evidence.top_k[index]
        assert set(layer.errors) == {"W4A16", "W8A16"}
        assert set(layer.scores) == {"router_score", "frequency", "reap", "output_norm"}
        unseen = [expert for expert, count in enumerate(layer.routed_tokens) if not count]
        assert evidence.unseen.get(index, []) == unseen
    assert Evidence.model_validate_json(evidence.model_dump_json()) == evidence


def test_stability_compares_the_halves(session: TrimSession, evidence: Evidence) -> None:
    every = batches()
    halves = [profile(session, part) for part in (every[::2], every[1::2])]
    expected = spearmanr(*(list(half.block_similarity.values()) for half in halves)).statistic
    assert evidence.stability["block similarity"] == pytest.approx(expected)
    assert all(value is None or -1 <= value <= 1 for value in evidence.stability.values())


def test_one_batch_is_too_little(session: TrimSession) -> None:
    with pytest.raises(ValueError, match="at least two are needed"):
        collect_evidence(session, batches()[:1], resolve_schemes(["W8A16"], 32, "schemes"))
