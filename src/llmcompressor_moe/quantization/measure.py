"""Measure what each candidate scheme does to each expert, on tokens that the router sent it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.offload import align_modules, get_execution_device
from torch import nn

from llmcompressor_moe.profile.forward import sum_over_ranks
from llmcompressor_moe.profile.samples import ExpertSample, LayerSample
from llmcompressor_moe.progress import progress
from llmcompressor_moe.quantization.schemes import Candidate
from llmcompressor_moe.quantization.trial import Trial

__all__ = ["LayerMeasurement", "measure_candidates", "measure_layer"]


@dataclass
class LayerMeasurement:
    """What is known of the experts of one MoE layer; lists have one entry per expert.

    :param tokens: tokens that entered the layer
    :param routed_tokens: tokens routed to each expert
    :param squared_weight: sum of squared router weights over these tokens
    :param sampled_weight: the same over the tokens on which candidates were tried
    :param sampled_error: candidate -> sum over the tried tokens of ||g (f(x) - f_q(x))||^2
    :param weight_error: candidate -> ||W - W_q||_F^2 over all weights of the expert
    :param output_power: mean over tokens of the squared norm of the experts' weighted sum
    """

    tokens: int
    routed_tokens: list[int]
    squared_weight: list[float]
    sampled_weight: list[float]
    sampled_error: dict[str, list[float]]
    weight_error: dict[str, list[float]]
    output_power: float


def measure_candidates(
    experts: Mapping[int, Sequence[nn.Module]],
    samples: Mapping[int, LayerSample],
    candidates: Sequence[Candidate],
) -> dict[int, LayerMeasurement]:
    """Try every candidate on every expert, one expert at a time.

    :param experts: block index -> linearized experts
    :param samples: block index -> what the experts did on calibration data
    :return: block index -> measurement, the same on all ranks
    """
    found = {}
    with progress(len(experts), "Trying schemes", passes=1) as advance:
        for layer in experts:
            found[layer] = measure_layer(experts[layer], samples[layer], candidates)
            advance(1)
    return found


def measure_layer(
    experts: Sequence[nn.Module], sample: LayerSample, candidates: Sequence[Candidate]
) -> LayerMeasurement:
    """Try every candidate on every expert of one layer.

    :param experts: linearized experts
    :param sample: what they did on calibration data
    :return: the same on all ranks
    """
    tried = [candidate for candidate in candidates if candidate.scheme is not None]
    device = get_execution_device(next(experts[0].children()))
    trials = {candidate.name: Trial(experts[0], candidate, device) for candidate in tried}
    # Row 0: weight of the tried tokens; rows 1..: error per candidate.
    sums = torch.zeros(1 + len(trials), len(experts), dtype=torch.float64)
    weight_error = {name: [0.0] * len(experts) for name in trials}
    for index, (expert, work) in enumerate(zip(experts, sample.experts, strict=True)):
        with align_modules(list(expert.modules())):
            inputs = work.inputs.to(device)
            sums[0, index] = float(work.weights.double().square().sum())
            for row, (name, trial) in enumerate(trials.items(), start=1):
                outputs, weight_error[name][index] = trial.run(expert, inputs)
                sums[row, index] = _error(work, outputs)
    sums = sum_over_ranks(sums)
    return LayerMeasurement(
        tokens=sample.tokens,
        routed_tokens=[work.routed_tokens for work in sample.experts],
        squared_weight=[work.squared_weight for work in sample.experts],
        sampled_weight=sums[0].tolist(),
        sampled_error={name: sums[row].tolist() for row, name in enumerate(trials, start=1)},
        weight_error=weight_error,
        output_power=sample.output_power,
    )


def _error(work: ExpertSample, outputs: torch.Tensor) -> float:
    """Sum over kept tokens of ||g (f(x) - f_q(x))||^2, in fp64."""
    if not len(work.inputs):
        return 0.0
    difference = work.outputs.to(outputs.device).double() - outputs.double()
    gates = work.weights.to(outputs.device).double()
    return float((difference.square().sum(dim=-1) * gates.square()).sum())
