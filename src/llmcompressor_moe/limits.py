"""Limits that a compressed model has to keep."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["BrokenLimit", "Figures", "Limits", "LimitsBrokenError", "broken_limits"]


# A limit that everything keeps is a slip, not a limit.
AtMost = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Limits(BaseModel):
    """Limits; those that are None are not looked at.

    :param max_perplexity_increase: share of the base's perplexity, 0.05 for 5 %
    :param max_kl: mean KL(base || compressed) of the next token, in nats
    :param min_top1_agreement: share of tokens whose most probable successor is the base's
    :param min_routing_overlap: mean share of a token's experts that are chosen again, among those that are left
    :param max_replaced: share of tokens whose whole set of experts changed
    """

    model_config = ConfigDict(extra="forbid")

    max_perplexity_increase: AtMost | None = None
    max_kl: AtMost | None = None
    min_top1_agreement: Share | None = None
    min_routing_overlap: Share | None = None
    max_replaced: Share | None = None

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return any(value is not None for value in self.model_dump().values())


class Figures(BaseModel):
    """What limits are about; None where there is nothing to measure.

    :param perplexity_increase: share of the base's perplexity
    :param routing_overlap: None where no MoE layer is left to compare
    """

    model_config = ConfigDict(extra="forbid")

    perplexity_increase: float
    kl: float
    top1_agreement: float
    routing_overlap: float | None
    replaced: float | None


class BrokenLimit(BaseModel):
    """A limit that a model does not keep."""

    model_config = ConfigDict(extra="forbid")

    limit: str
    bound: float
    value: float

    def __str__(self) -> str:
        return f"{self.limit}={self.bound:g}: the model has {self.value:.4g}"


class LimitsBrokenError(ValueError):
    """A model does not keep its limits."""

    def __init__(self, broken: list[BrokenLimit], where: str) -> None:
        self.broken = broken
        super().__init__(f"limits are broken: {'; '.join(map(str, broken))}. {where}")


def broken_limits(limits: Limits, figures: Figures) -> list[BrokenLimit]:
    """Those limits that the figures do not keep; equality keeps a limit, and so does having nothing to measure."""
    broken = []
    for name, bound in limits.model_dump().items():
        kind, _, figure = name.partition("_")
        value = getattr(figures, figure)
        if bound is None or value is None:
            continue
        if not (value <= bound if kind == "max" else value >= bound):
            broken.append(BrokenLimit(limit=name, bound=bound, value=value))
    return broken
