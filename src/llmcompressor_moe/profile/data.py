"""What a calibration pass leaves behind: plain numbers that can be saved, read and compared."""

from __future__ import annotations

import math
from enum import Enum

from pydantic import BaseModel, ConfigDict

__all__ = ["ExpertProfile", "Profile", "Statistic", "require_finite"]


class Statistic(str, Enum):
    """A group of numbers that a pass can collect; a pass collects only what somebody asked for."""

    BLOCK = "block similarity"
    RUN = "similarity over runs of blocks"
    LAYER = "MoE layer similarity"
    ROUTING = "routing probabilities and counts"
    OUTPUT = "expert output norms"
    REDUNDANCY = "similarity between expert outputs"


class ExpertProfile(BaseModel):
    """Sums over calibration tokens for the experts of one MoE layer; every list has one entry per expert.

    :param routed_tokens: number of tokens routed to the expert
    :param gate_weight: sum over routed tokens of the router's weight for the expert
    :param routing_probability: sum over all tokens of the softmax over all experts; None where the router has
        no softmax, or limits the choice to groups of experts
    :param output_norm: sum over routed tokens of the L2 norm of the expert's output
    :param weighted_output_norm: sum over routed tokens of router weight times that norm
    :param output_similarity: mean cosine similarity of two experts' outputs on the same tokens, [experts,
        experts]
    """

    model_config = ConfigDict(extra="forbid")

    routed_tokens: list[int]
    gate_weight: list[float]
    routing_probability: list[float] | None = None
    output_norm: list[float] | None = None
    weighted_output_norm: list[float] | None = None
    output_similarity: list[list[float]] | None = None


class Profile(BaseModel):
    """Statistics of one model over one calibration set. Keys are original block indices.

    :param num_tokens: tokens seen (padding left out)
    :param num_samples: sequences seen
    :param block_similarity: mean over tokens of the cosine of a block's input and output in the residual
        stream
    :param run_similarity: first block of a run -> the same for the run's input and output
    :param run_length: blocks per run in ``run_similarity``
    :param layer_similarity: mean over tokens of the cosine of the residual stream before and after an MoE
        layer
    :param experts: routed experts' statistics per MoE layer
    """

    model_config = ConfigDict(extra="forbid")

    num_tokens: int
    num_samples: int
    block_similarity: dict[int, float] = {}
    run_similarity: dict[int, float] = {}
    run_length: int | None = None
    layer_similarity: dict[int, float] = {}
    experts: dict[int, ExpertProfile] = {}

    def check_finite(self) -> None:
        """Refuse a profile that rests on NaN or infinite activations.

        :raises FloatingPointError: names the block and the statistic
        """
        similarities = {
            "block": self.block_similarity,
            "run": self.run_similarity,
            "layer": self.layer_similarity,
        }
        for name, values in similarities.items():
            for index, value in values.items():
                require_finite(value, f"{name}_similarity", index)
        for index, experts in self.experts.items():
            for name in ("gate_weight", "routing_probability", "output_norm", "weighted_output_norm"):
                for value in getattr(experts, name) or []:
                    require_finite(value, name, index)
            for row in experts.output_similarity or []:
                for value in row:
                    require_finite(value, "output_similarity", index)


def require_finite(value: float, statistic: str, block: int) -> None:
    """Refuse a number that comes from NaN or infinite activations.

    :raises FloatingPointError: names the block and the statistic
    """
    if not math.isfinite(value):
        raise FloatingPointError(
            f"Calibration gave {statistic} = {value} in block {block}: the activations there are NaN or "
            f"infinite. No part "
            "was dropped. Check the weights and the dtype (a model in float16 often overflows: load it in "
            "bfloat16)."
        )
