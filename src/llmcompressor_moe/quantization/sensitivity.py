"""From measurements to the error that each scheme is expected to cause in each expert.

Every sensitivity is a pure function `LayerMeasurement` -> candidate -> error per expert; errors of different
layers are compared with each other, so they share one unit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmcompressor_moe.quantization.measure import LayerMeasurement

__all__ = ["PRIOR_TOKENS", "SENSITIVITIES", "Sensitivity", "SensitivityInput", "sensitivity", "starved"]

# Tokens' worth of the layer's average error that every expert is given on top of its own.
PRIOR_TOKENS = 16

Errors = dict[str, list[float]]


@dataclass(frozen=True)
class SensitivityInput:
    """What a sensitivity may look at in one MoE layer.

    :param bits: candidate -> bits per weight, scales counted
    :param layer: block index
    """

    measurement: LayerMeasurement
    bits: Mapping[str, float]
    layer: int
    seed: int


@dataclass(frozen=True)
class Sensitivity:
    """One way to say what a scheme costs.

    :param errors: candidate -> error per expert; candidates that change nothing are left out
    :param source: where it comes from
    :param needs_data: whether calibration data is needed
    """

    errors: Callable[[SensitivityInput], Errors]
    source: str
    needs_data: bool = True


def starved(measurement: LayerMeasurement) -> list[int]:
    """Experts that too few tokens were routed to for their own error to be trusted."""
    return [index for index, count in enumerate(measurement.routed_tokens) if count < PRIOR_TOKENS]


def output_error(given: SensitivityInput) -> Errors:
    """Router-weighted output error, E ||g (f(x) - f_q(x))||^2: summed over routed tokens, divided by all tokens.

    A frequent expert's error is measured on a sample and scaled by the squared
    router weights of all its tokens. Every expert gets `PRIOR_TOKENS` tokens more with its layer's mean error per
    routed token, times how much rounding changes its weights against the layer's mean: experts that saw few
    tokens are not taken for experts that tolerate low precision, and with many tokens it makes no difference.
    """
    seen = given.measurement
    total = sum(seen.routed_tokens)
    scale = 1 / max(seen.tokens, 1)
    found: Errors = {}
    for name, sampled in seen.sampled_error.items():
        own = [
            error * weight / tried if tried else 0.0
            for error, weight, tried in zip(sampled, seen.squared_weight, seen.sampled_weight, strict=True)
        ]
        per_token = sum(own) / total if total else 0.0
        changes = seen.weight_error[name]
        mean_change = sum(changes) / len(changes)
        prior = [change / mean_change if mean_change else 1.0 for change in changes]
        found[name] = [
            (error + PRIOR_TOKENS * per_token * share) * scale
            for error, share in zip(own, prior, strict=True)
        ]
    return found


def frequency(given: SensitivityInput) -> Errors:
    """Share of the layer's routed choices times the rounding error that bits alone suggest, 4^-bits."""
    counts = given.measurement.routed_tokens
    total = max(sum(counts), 1)
    return _by_bits(given, [count / total for count in counts])


def weight_error(given: SensitivityInput) -> Errors:
    """Frobenius norm of what rounding changes in the weights, squared; the router is not asked."""
    return {name: list(errors) for name, errors in given.measurement.weight_error.items()}


def uniform(given: SensitivityInput) -> Errors:
    """All experts alike; only bits count, 4^-bits."""
    return _by_bits(given, [1.0] * len(given.measurement.routed_tokens))


def random_importance(given: SensitivityInput) -> Errors:
    """Every expert's importance uniform in (0, 1) from the seed, times 4^-bits; a baseline."""
    count = len(given.measurement.routed_tokens)
    return _by_bits(
        given, [random.Random(f"{given.seed}/{given.layer}/{expert}").random() for expert in range(count)]
    )


def _by_bits(given: SensitivityInput, importance: list[float]) -> Errors:
    """Uniform rounding: each bit more divides the mean squared error by four."""
    return {
        name: [value * 4.0 ** -given.bits[name] for value in importance]
        for name in given.measurement.weight_error
    }


SENSITIVITIES: dict[str, Sensitivity] = {
    "output_error": Sensitivity(
        output_error, "this package; REAP (arXiv 2510.13999) for the router's weight"
    ),
    "frequency": Sensitivity(frequency, "MC-MoE (arXiv 2410.06270), frequency alone"),
    "weight_error": Sensitivity(weight_error, "rounding error of the weights", needs_data=False),
    "uniform": Sensitivity(uniform, "baseline", needs_data=False),
    "random": Sensitivity(random_importance, "baseline", needs_data=False),
}


def sensitivity(name: str) -> Sensitivity:
    """Look up a sensitivity.

    :raises ValueError: there is none of this name
    """
    if name not in SENSITIVITIES:
        raise ValueError(f"sensitivity={name!r} is unknown; there are {', '.join(SENSITIVITIES)}.")
    return SENSITIVITIES[name]
