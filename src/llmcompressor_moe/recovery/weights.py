"""How much each loss counts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmcompressor_moe.recovery.alignment import Alignment

__all__ = ["LossWeights"]

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_LOSSES = ("next_token", "logits_kl", "router_kl", "expert_output", "hidden", "load_balancing")
_OF_TEACHER = ("logits_kl", "router_kl", "expert_output", "hidden")
_OF_PARTS = ("router_kl", "expert_output", "hidden")
_OF_LAYERS = ("router_kl", "expert_output", "load_balancing")


class LossWeights(BaseModel):
    """The loss is the sum of these weights times the losses in `losses`; 0 leaves one out, and saves its work.

    :param next_token: of the text itself
    :param logits_kl: of the teacher's predictions
    :param router_kl: mean over MoE layers
    :param expert_output: `matching` of what an MoE layer returns, mean over MoE layers
    :param hidden: `matching` of what a block returns, mean over blocks
    :param load_balancing: mean over MoE layers; needs no teacher
    :param temperature: of ``logits_kl``
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    next_token: _Weight = 0.0
    logits_kl: _Weight = 1.0
    router_kl: _Weight = 0.0
    expert_output: _Weight = 0.0
    hidden: _Weight = 0.0
    load_balancing: _Weight = 0.0
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _something_to_train_on(self) -> LossWeights:
        if not self.used:
            raise ValueError(
                f"all weights are 0, so there is nothing to train on; give one of {', '.join(_LOSSES)}"
            )
        return self

    @property
    def used(self) -> tuple[str, ...]:
        """The losses that count."""
        return self._among(_LOSSES)

    @property
    def of_teacher(self) -> tuple[str, ...]:
        """Those of them that need a teacher."""
        return self._among(_OF_TEACHER)

    @property
    def of_parts(self) -> tuple[str, ...]:
        """Those of them that compare parts of the student with the teacher's, and so need an alignment and a
        teacher in memory.
        """
        return self._among(_OF_PARTS)

    @property
    def of_layers(self) -> tuple[str, ...]:
        """Those of them that need a student with MoE layers."""
        return self._among(_OF_LAYERS)

    def check_alignment(self, alignment: Alignment | None) -> None:
        """Make sure that there is an alignment if one is needed, with MoE layers if those are.

        :raises ValueError: there is not; names the weights
        """
        if alignment is None and self.of_parts:
            raise ValueError(
                f"{_listed(self.of_parts)} compare parts of the student with parts of the teacher: tell which "
                "belong together (alignment.align), or give the weight 0."
            )
        layered = [name for name in self.of_layers if name in _OF_PARTS]
        if alignment is not None and layered and not alignment.layers:
            raise ValueError(
                f"{_listed(layered)} need MoE layers, and the student has none; give the weight 0."
            )

    def check_cached(self) -> None:
        """Make sure that a cache of the teacher's logits says all that is needed of the teacher.

        :raises ValueError: it does not; names the weights
        """
        if self.of_parts:
            raise ValueError(
                f"{_listed(self.of_parts)} need the teacher itself, and a cache holds its logits only; give the "
                "weight 0, or train without a cache."
            )

    def _among(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if getattr(self, name) > 0)


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names)
