"""One router's distribution over its experts while a student learns, or why there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from llmcompressor_moe.profile.routers import RouterReader

__all__ = ["RouterScores"]


class RouterScores:
    """Reads one router's output as logits whose softmax over any of the experts is its distribution over them; see
    `RouterReader.logits`.

    :param router: the module, with adapters or not
    :param num_experts: experts that it scores
    :param place: what to call it in errors
    :param config: of the model
    """

    def __init__(
        self, router: nn.Module, num_experts: int, place: str, config: PreTrainedConfig | None = None
    ) -> None:
        self._num_experts = num_experts
        self._place = place
        self._reader = RouterReader(router, num_experts, config)

    def read(self, output: Any) -> torch.Tensor:
        """Logits, [tokens, experts] in fp32.

        :param output: what the router returned
        :raises ValueError: the scores of all experts are not in it
        """
        logits = self._reader.logits(output)
        if logits is None:
            raise ValueError(
                f"The router of {self._place} does not tell how it scores its {self._num_experts} experts, so "
                "router_kl and load_balancing cannot be had for this model; give both the weight 0."
            )
        return logits
