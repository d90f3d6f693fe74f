"""What a calibration run leaves behind for sweeps and forecasts: plain numbers, saved as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Evidence", "LayerEvidence"]


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

    routed_tokens: list[int]
    output_power: float
    lost_power: list[float]
    errors: dict[str, list[float]]
    scores: dict[str, list[float | None]]


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
    :param stability: statistic -> Spearman's rank correlation of its scores between the two halves of the data
    """

    model_config = ConfigDict(extra="forbid")

    model_type: str
    blocks: int
    top_k: dict[int, int]
    tokens: int
    samples: int
    kl_samples: int
    block_similarity: dict[int, float]
    layer_similarity: dict[int, float]
    block_divergence: dict[int, float]
    layer_divergence: dict[int, float]
    layers: dict[int, LayerEvidence]
    stability: dict[str, float | None]

    @property
    def unseen(self) -> dict[int, list[int]]:
        """Block index -> experts that no calibration token was routed to; layers without any are left out."""
        found = {index: _zeros(layer.routed_tokens) for index, layer in self.layers.items()}
        return {index: experts for index, experts in found.items() if experts}


def _zeros(counts: list[int]) -> list[int]:
    return [index for index, count in enumerate(counts) if count == 0]
