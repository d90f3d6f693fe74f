"""What router calibration did, layer by layer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from llmcompressor_moe.report import ModifierReport

__all__ = ["CalibratedLayer", "RouterCalibrationReport"]


class CalibratedLayer(BaseModel):
    """One MoE layer on held-out tokens.

    :param error_before: E ||MoE(x) - y||^2 / E ||y||^2 over tokens, y what the layer gave before compression and x
        what it receives now
    :param error_after: the same with the parameters that were fitted
    :param kept: whether these are in the model; False where they did not help
    :param factors: one factor per expert that went into its weights; empty where none did
    """

    model_config = ConfigDict(extra="forbid")

    error_before: float
    error_after: float
    kept: bool
    factors: list[float] = []


class RouterCalibrationReport(ModifierReport):
    """Report of a RouterCalibrationModifier. Indices are those of the model as it came into the recipe.

    :param objective: ``output`` or ``layer``
    :param layers: block index -> what came of it
    :param divergence_before: mean KL of the next token from the model before compression, in nats, on held-out
        tokens; None for offloaded models
    :param divergence_after: the same at the end
    :param kept: whether anything is changed at all
    :param held_out: whether the figures are of batches that nothing was fitted on
    """

    objective: str
    layers: dict[int, CalibratedLayer] = Field(default_factory=dict)
    divergence_before: float | None = None
    divergence_after: float | None = None
    kept: bool
    held_out: bool

    @classmethod
    def own_fields(cls) -> list[str]:
        """The fields that not every report has."""
        return [name for name in cls.model_fields if name not in ModifierReport.model_fields]

    def describe(self) -> str:
        """One line for the model card."""
        if not self.kept:
            return f"{self.modifier}: nothing changed, it did not help on held-out data"
        parts = ", ".join(self.settings.get("parts", ["router"]))
        layers = sum(layer.kept for layer in self.layers.values())
        kl = (
            f", KL to the model before {self.divergence_before:.3f} -> {self.divergence_after:.3f} nats"
            if self.divergence_before is not None
            else ""
        )
        return f"{self.modifier}: {parts} of {layers} MoE layers by {self.objective}{kl}"
