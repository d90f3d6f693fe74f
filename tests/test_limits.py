"""Limits that compressed models have to keep."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from llmcompressor_moe.limits import Figures, Limits, broken_limits

FIGURES = Figures(perplexity_increase=0.04, kl=0.1, top1_agreement=0.9, routing_overlap=0.8, replaced=0.01)
KEPT = {
    "max_perplexity_increase": 0.04,
    "max_kl": 0.2,
    "min_top1_agreement": 0.9,
    "min_routing_overlap": 0.7,
    "max_replaced": 0.01,
}
BROKEN = {
    "max_perplexity_increase": 0.03,
    "max_kl": 0.09,
    "min_top1_agreement": 0.91,
    "min_routing_overlap": 0.81,
    "max_replaced": 0.0,
}


def test_every_limit_is_tried() -> None:
    assert KEPT.keys() == BROKEN.keys() == Limits.model_fields.keys()
    assert not Limits().any
    assert broken_limits(Limits(), FIGURES) == []
    assert broken_limits(Limits(**KEPT), FIGURES) == []
    assert [broken.limit for broken in broken_limits(Limits(**BROKEN), FIGURES)] == list(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_limit_says_its_bound_and_the_value(name: str) -> None:
    (broken,) = broken_limits(Limits(**{**KEPT, name: BROKEN[name]}), FIGURES)
    value = getattr(FIGURES, name.partition("_")[2])
    assert (broken.limit, broken.bound, broken.value) == (name, BROKEN[name], value)
    assert str(broken) == f"{name}={BROKEN[name]:g}: the model has {value:.4g}"


def test_nothing_to_measure_keeps_a_limit() -> None:
    without = FIGURES.model_copy(update={"routing_overlap": None, "replaced": None})
    assert broken_limits(Limits(min_routing_overlap=1, max_replaced=0), without) == []


def test_nan_breaks_every_limit() -> None:
    nan = FIGURES.model_copy(update=dict.fromkeys(FIGURES.model_dump(), float("nan")))
    assert len(broken_limits(Limits(**KEPT), nan)) == len(KEPT)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_kl": -1},
        {"max_kl": math.inf},
        {"max_perplexity_increase": math.nan},
        {"min_top1_agreement": 1.1},
        {"max_replaced": 2},
        {"max_x": 1},
    ],
)
def test_limits_that_cannot_be(fields: dict) -> None:
    with pytest.raises(ValidationError):
        Limits(**fields)
