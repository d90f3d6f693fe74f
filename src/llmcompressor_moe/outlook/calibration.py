"""How first-order damage turns into loss: one curve, fitted on models that were really cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import least_squares

from llmcompressor_moe.outlook.damage import KINDS, Damage

__all__ = ["Calibration", "CalibrationError", "Observation", "bundled_calibration", "fit", "fit_curve"]

# What a point's own noise is weighed against before the spread is known; the square root of it decides nothing but
# how much less points near the noise count.
_TYPICAL_SPREAD = 0.2
# Points nearer to zero than so many standard errors of the text are not fitted: their logarithm is noise.
_SIGNAL = 2.0


class CalibrationError(ValueError):
    """Observations do not suffice for a fit."""


@dataclass(frozen=True)
class Observation:
    """A cut model that was measured.

    :param model: name of the model that it was made from
    :param nll_increase: of its mean negative log-likelihood against that model's, nats per token
    :param noise: standard error of that, from the number of tokens
    """

    model: str
    damage: Damage
    nll_increase: float
    noise: float = 0.0


class Calibration(BaseModel):
    """Loss in nats per token = (sum over kinds of factor * first-order damage) ** exponent.

    :param factors: kind of damage -> what a nat of first-order damage weighs
    :param spread: standard deviation of log(measured / predicted) on models that were not fitted on; where
        there is one model only, on that model
    :param freedom: degrees of freedom behind ``spread``
    :param models: models that were cut and measured
    :param points: measured points that were fitted
    :param made_by: how to make it again
    """

    model_config = ConfigDict(extra="forbid")

    factors: dict[str, float]
    exponent: float = Field(gt=0)
    spread: float = Field(ge=0)
    freedom: int = Field(ge=1)
    models: list[str]
    points: int
    made_by: str = ""

    def loss(self, damage: Damage) -> float:
        """Predicted increase of the mean negative log-likelihood, nats per token."""
        return sum(self.factors[kind] * getattr(damage, kind) for kind in KINDS) ** self.exponent


@lru_cache(maxsize=1)
def bundled_calibration() -> Calibration:
    """The calibration that the package comes with; see docs/forecast.md."""
    return Calibration.model_validate_json(
        files(__package__).joinpath("calibration.json").read_text(encoding="utf-8")
    )


def fit(observations: Sequence[Observation], made_by: str = "") -> Calibration:
    """Fit the curve on all observations, and its spread on models left out one at a time.

    The spread is the root of the mean over cells of the mean squared log-residual, where a cell is what one model
    showed of one kind of damage (or of several at once), predicted by the curve of the other models: so it holds
    both how points scatter around a model's curve and how models differ. Its degrees of freedom are the number of
    cells less the number of coefficients. With one model there is nobody to leave out: the spread is then that of
    its own points, and counts with one degree of freedom, however many they are, as one model tells nothing of how
    models differ.

    :raises CalibrationError: a kind of damage never occurs alone or in company, or there are too few points
    """
    usable = _usable(observations)
    factors, exponent = fit_curve(usable)
    names = list(dict.fromkeys(one.model for one in usable))
    coefficients = len(KINDS) + 1
    if len(names) == 1:
        residuals = [_residual(one, factors, exponent) for one in usable]
        spread = math.sqrt(sum(r * r for r in residuals) / (len(usable) - coefficients))
        freedom = 1
    else:
        cells: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        for name in names:
            others = fit_curve([one for one in usable if one.model != name])
            for one in usable:
                if one.model == name:
                    kinds = one.damage.kinds if len(one.damage.kinds) == 1 else ("mixed",)
                    cells.setdefault((name, kinds), []).append(_residual(one, *others))
        spread = math.sqrt(float(np.mean([np.mean(np.square(cell)) for cell in cells.values()])))
        freedom = max(len(cells) - coefficients, 1)
    return Calibration(
        factors=factors,
        exponent=exponent,
        spread=spread,
        freedom=freedom,
        models=names,
        points=len(usable),
        made_by=made_by,
    )


def fit_curve(
    observations: Sequence[Observation], exponent: float | None = None
) -> tuple[dict[str, float], float]:
    """Factors and exponent by least squares of the logarithm; points near the text's noise weigh less.

    :param exponent: hold it at this instead of fitting it
    :raises CalibrationError: see `fit`
    """
    usable = _usable(observations)
    damage = np.array([[getattr(one.damage, kind) for kind in KINDS] for one in usable])
    missing = [kind for kind, column in zip(KINDS, damage.T, strict=True) if not column.any()]
    if missing or len(usable) <= len(KINDS) + 1:
        raise CalibrationError(
            f"{len(usable)} usable observations, none with damage of {missing or 'too few points'}: "
            f"at least {len(KINDS) + 2} are needed, and each of {', '.join(KINDS)} in one of them."
        )
    measured = np.log([one.nll_increase for one in usable])
    noise = np.array([one.noise / one.nll_increase for one in usable])
    weight = 1 / np.sqrt(_TYPICAL_SPREAD**2 + noise**2)

    def residuals(parameters: np.ndarray) -> np.ndarray:
        power = exponent or parameters[-1]
        return (power * np.log(damage @ np.exp(parameters[: len(KINDS)])) - measured) * weight

    found = least_squares(residuals, [0.0] * len(KINDS) + ([1.0] if exponent is None else []))
    power = float(exponent or found.x[-1])
    if not found.success or power <= 0:
        raise CalibrationError("the observations follow no rising curve; look at them one by one.")
    factors = map(float, np.exp(found.x[: len(KINDS)]))
    return dict(zip(KINDS, factors, strict=True)), power


def _usable(observations: Sequence[Observation]) -> list[Observation]:
    return [
        one
        for one in observations
        if one.damage.kinds and one.nll_increase > 0 and one.nll_increase > _SIGNAL * one.noise
    ]


def _residual(one: Observation, factors: dict[str, float], exponent: float) -> float:
    weighed = sum(factors[kind] * getattr(one.damage, kind) for kind in KINDS)
    return math.log(one.nll_increase) - exponent * math.log(weighed)
