"""Layer Drop: remove whole MoE layers and keep the rest of their blocks."""

from __future__ import annotations

from typing import Literal

from llmcompressor_moe.families import exception_for
from llmcompressor_moe.modifiers.part_drop import PartDropModifier
from llmcompressor_moe.profile import Profile
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["LayerDropModifier"]


class LayerDropModifier(PartDropModifier):
    """Drops MoE layers (arXiv 2406.02500, Layer Drop): router, experts and shared experts go, attention
    stays.

    An MoE layer's score is the cosine of the residual stream before and after it, mean over tokens; the most
    similar ones go. Dense feed-forward layers are never candidates. Takes exactly one of ``num_drop``,
    ``drop_ratio``, ``threshold``, ``layers`` and ``plan_path``. The checkpoint says ``per_layer_config``; the
    vLLM plugin and `load_trimmed_moe` read it.

    Sample YAML::

        LayerDropModifier:
          num_drop: 8
          metric: cosine
          protect: [0, 31]
          report_path: layer_drop.json

    :param layers: indices of blocks whose MoE layer goes; needs no data
    """

    layers: list[int] | None = None

    def _amount_fields(self) -> tuple[str, ...]:
        return ("num_drop", "drop_ratio", "threshold", "layers", "plan_path")

    def _explicit(self) -> list[int] | None:
        return self.layers

    def _part(self) -> Literal["block", "layer"]:
        return "layer"

    def _all_parts(self) -> list[int]:
        return sorted(self._session.topology.moe_layers)

    def _candidates(self) -> list[int]:
        return self._session.layers

    def _similarity(self, profile: Profile) -> dict[int, float]:
        return profile.layer_similarity

    def _drop(self, index: int) -> None:
        self._session.drop_layer(index)

    def _check_model(self, session: TrimSession) -> None:
        exception = exception_for(session.topology.model_type)
        reason = exception.refuse_layer_drop or exception.refuse_uneven
        if reason is None and any(moe.inline for moe in session.topology.moe_layers.values()):
            reason = "its router and experts stand directly in the block: there is no MoE layer to take out"
        if reason is not None:
            raise ValueError(f"LayerDropModifier cannot trim {session.topology.model_type!r}: {reason}.")
        super()._check_model(session)
