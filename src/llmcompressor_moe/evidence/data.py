"""What a calibration run leaves behind for sweeps and forecasts: plain numbers, saved as JSON."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

__all__ = ["Evidence", "LayerEvidence"]


Power = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LayerEvidence(BaseModel):
    """One MoE layer; lists have one entry per expert.

    :param routed_tokens: calibration tokens routed to each expert
    :param output_power: mean over tokens of the squared norm of the experts' weighted sum
    :param lost_power: E over tokens of ||g f(x)||^2, the power of each expert's own part of that sum
    :param errors: candidate -> E over tokens of ||g (f(x) - f_q(x))||^2; candidates that change nothing are left
        out
    :param scores: criterion -> score per expert, null without evidence
    """

    model_config = ConfigDict(extra="forbid")

    routed_tokens: list[NonNegativeInt]
    output_power: Power
    lost_power: list[Power]
    errors: dict[str, list[Power]]
    scores: dict[str, list[FiniteFloat | None]]

    @model_validator(mode="after")
    def _check_lengths(self) -> LayerEvidence:
        experts = len(self.routed_tokens)
        lists = {"lost_power": self.lost_power} | {
            f"{field}.{name}": values
            for field in ("errors", "scores")
            for name, values in getattr(self, field).items()
        }
        for name, values in lists.items():
            if len(values) != experts:
                raise ValueError(f"{name} has {len(values)} entries, routed_tokens {experts}: one per expert")
        return self


class Evidence(BaseModel):
    """What one calibration run tells about a model. Keys are block indices.

    :param blocks: number of blocks
    :param top_k: experts that a token is routed to
    :param tokens: calibration tokens behind the statistics
    :param samples: calibration sequences
    :param kl_samples: sequences behind the divergences
    :param block_similarity: cosine of the residual stream before and after a block
    :param layer_similarity: the same for an MoE layer
    :param block_divergence: KL(intact || without this block), nats per token
    :param layer_divergence: the same for an MoE layer
    :param layers: MoE layers
    :param schemes: candidate -> its scheme as it was tried on the experts, null for 16 bit
    :param fingerprint: of the model, see `checkpoint.fingerprint`; None where it came from no directory
    :param stability: statistic -> Spearman's rank correlation of its scores between the two halves of the data
    """

    model_config = ConfigDict(extra="forbid")

    model_type: str
    blocks: PositiveInt
    top_k: dict[int, int]
    tokens: NonNegativeInt
    samples: NonNegativeInt
    kl_samples: NonNegativeInt
    block_similarity: dict[int, FiniteFloat]
    layer_similarity: dict[int, FiniteFloat]
    block_divergence: dict[int, FiniteFloat]
    layer_divergence: dict[int, FiniteFloat]
    layers: dict[int, LayerEvidence]
    stability: dict[str, float | None]
    schemes: dict[str, dict[str, Any] | None] = {}
    fingerprint: str | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> Evidence:
        for parts, fields in (
            (set(range(self.blocks)), ("block_similarity", "block_divergence")),
            (set(self.layers), ("top_k", "layer_similarity", "layer_divergence")),
        ):
            for name in fields:
                if lacking := sorted(parts - set(getattr(self, name))):
                    raise ValueError(f"{name} lacks {lacking}")
        for name in ("errors", "scores"):
            if len({frozenset(getattr(layer, name)) for layer in self.layers.values()}) > 1:
                raise ValueError(f"layers: {name} are not of the same names in every layer")
        return self

    @property
    def unseen(self) -> dict[int, list[int]]:
        """Block index -> experts that no calibration token was routed to; layers without any are left out."""
        found = {index: _zeros(layer.routed_tokens) for index, layer in self.layers.items()}
        return {index: experts for index, experts in found.items() if experts}


def _zeros(counts: list[int]) -> list[int]:
    return [index for index, count in enumerate(counts) if count == 0]
