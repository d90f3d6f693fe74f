"""First-order damage: what everything that goes or is rounded would cost, were it alone. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pydantic import BaseModel, ConfigDict, Field

from llmcompressor_moe.evidence import Evidence, LayerEvidence
from llmcompressor_moe.quantization.schemes import UNQUANTIZED
from llmcompressor_moe.sweep.choice import Drops

__all__ = ["KINDS", "Damage", "first_order_damage"]

KINDS = ("blocks", "layers", "experts", "bits")


class Damage(BaseModel):
    """Sums over parts, in nats per token, by what is done to them.

    :param blocks: of dropped blocks
    :param layers: of MoE layers that are dropped from blocks that stay
    :param experts: of experts that are dropped from MoE layers that stay
    :param bits: of experts that stay and are rounded
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    blocks: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    layers: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    experts: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    bits: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is done at all."""
        return tuple(kind for kind in KINDS if getattr(self, kind) > 0)


def first_order_damage(evidence: Evidence, drops: Drops, schemes: Mapping[int, str]) -> Damage:
    """Add up what each part costs.

    A block or an MoE layer costs the divergence that was measured without it. For small perturbations KL is
    quadratic in them (half the perturbation's Fisher norm: Kullback, Information Theory and Statistics, 1959,
    chapter 2, section 6), and a layer that is gone is a relative squared error of 1 in that layer; so a relative
    squared error of r, at most 1, in a layer's routed output costs r times the layer's divergence. Dropped
    experts have r = sum of their ``lost_power`` / ``output_power``; a scheme r = sum of the ``errors`` of the
    experts that stay / ``output_power``. Nothing counts twice: layers of dropped blocks, and experts and schemes
    of layers that are gone, cost nothing more.

    :param drops: by the base's indices
    :param schemes: block index -> scheme of its experts
    :raises ValueError: an index or a scheme that the evidence does not know
    """
    _require_known(drops.blocks, evidence.block_divergence, "blocks", "blocks")
    for name, indices in (("layers", drops.layers), ("experts", drops.experts), ("schemes", schemes)):
        _require_known(indices, evidence.layers, name, "MoE layers")
    blocks = set(drops.blocks)
    layers = set(drops.layers) - blocks
    here = [index for index in evidence.layers if index not in blocks | layers]
    return Damage(
        blocks=sum(max(evidence.block_divergence[index], 0.0) for index in sorted(blocks)),
        layers=sum(max(evidence.layer_divergence[index], 0.0) for index in sorted(layers)),
        experts=sum(
            _cost(evidence, index, _lost(evidence.layers[index], drops.experts[index], index))
            for index in here
            if index in drops.experts
        ),
        bits=sum(
            _cost(
                evidence,
                index,
                _rounded(evidence.layers[index], drops.experts.get(index, ()), schemes[index]),
            )
            for index in here
            if index in schemes
        ),
    )


def _cost(evidence: Evidence, layer: int, power: float) -> float:
    """Nats per token of an error of this power in a layer's routed output."""
    whole = evidence.layers[layer].output_power
    relative = min(power / whole, 1.0) if whole > 0 else 0.0
    return max(evidence.layer_divergence[layer], 0.0) * relative


def _lost(layer: LayerEvidence, experts: Collection[int], index: int) -> float:
    count = len(layer.lost_power)
    unknown = [expert for expert in experts if not 0 <= expert < count]
    if unknown:
        raise ValueError(f"experts={unknown} of block {index}: it has experts 0 to {count - 1}.")
    return sum(layer.lost_power[expert] for expert in sorted(set(experts)))


def _rounded(layer: LayerEvidence, gone: Collection[int], scheme: str) -> float:
    if scheme == UNQUANTIZED:
        return 0.0
    if scheme not in layer.errors:
        raise ValueError(f"schemes: the evidence does not know {scheme!r}; it has {sorted(layer.errors)}.")
    return sum(error for expert, error in enumerate(layer.errors[scheme]) if expert not in gone)


def _require_known(indices: Collection[int], known: Collection[int], field: str, what: str) -> None:
    unknown = sorted(set(indices) - set(known))
    if unknown:
        raise ValueError(f"{field}={unknown}: the evidence has {what} {sorted(known)}.")
