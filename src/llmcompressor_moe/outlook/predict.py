"""From first-order damage to a loss with an interval. Pure arithmetic."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict
from scipy.stats import t

from llmcompressor_moe.outlook.calibration import Calibration
from llmcompressor_moe.outlook.damage import Damage

__all__ = ["CONFIDENCE", "LossForecast", "predict_loss"]

CONFIDENCE = 0.9


class LossForecast(BaseModel):
    """Increases of the mean negative log-likelihood, nats per token, and factors on the perplexity.

    :param nll_increase: half of all cut models are expected above it, half below
    :param nll_low: lower end of the prediction interval
    :param nll_high: its upper end
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    nll_increase: float
    nll_low: float
    nll_high: float
    perplexity_factor: float
    perplexity_low: float
    perplexity_high: float

    def keeps(self, allowed_increase: float) -> bool:
        """Whether even the upper end leaves the perplexity within an increase.

        :param allowed_increase: relative, 0.05 for five percent
        """
        return self.nll_high <= math.log1p(allowed_increase)


def predict_loss(damage: Damage, calibration: Calibration, confidence: float = CONFIDENCE) -> LossForecast:
    """What damage is expected to cost.

    The interval is that of a new value under Student's t in the logarithm: errors of the curve are factors.

    :param confidence: share of cut models that are expected within the interval
    :raises ValueError: ``confidence`` is not between 0 and 1
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: give a share between 0 and 1.")
    middle = calibration.loss(damage)
    reach = math.exp(float(t.ppf((1 + confidence) / 2, calibration.freedom)) * calibration.spread)
    low, high = middle / reach, middle * reach
    return LossForecast(
        nll_increase=middle,
        nll_low=low,
        nll_high=high,
        perplexity_factor=_factor(middle),
        perplexity_low=_factor(low),
        perplexity_high=_factor(high),
    )


def _factor(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
