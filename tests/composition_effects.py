"""What each modifier must have done to a model, asserted on everything that stayed."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.surgery.skipped import SkippedMoE
from llmcompressor_moe.topology import expert_modules, find_topology

_QUANTIZERS = ("quantization", "some_layers", "gptq", "awq", "autoround", "raq")


@dataclass(frozen=True)
class Outcome:
    """What a recipe left.

    :param base: the model before
    :param model: in memory, after saving
    :param reloaded: from the saved checkpoint
    :param order: the parts of the recipe
    """

    base: PreTrainedModel
    model: PreTrainedModel
    reloaded: PreTrainedModel
    order: tuple[str, ...]

    def dropped(self, modifier: str) -> list[Any]:
        """What the drop modifiers of that class dropped, one entry each."""
        return [report.dropped for report in self.model._trim_history if report.modifier == modifier]

    @property
    def blocks_dropped(self) -> set[int]:
        """Original indices."""
        return {index for dropped in self.dropped("BlockDropModifier") for index in dropped}

    @property
    def layers_dropped(self) -> set[int]:
        """Original indices of the blocks that lost their MoE layer and are there."""
        dropped = {index for indices in self.dropped("LayerDropModifier") for index in indices}
        return dropped - self.blocks_dropped

    def blocks(self) -> Iterator[tuple[nn.Module, nn.Module, int]]:
        """(block before, block reloaded, original index) of the blocks that stayed."""
        before = self.base.model.layers
        kept = [index for index in range(len(before)) if index not in self.blocks_dropped]
        for index, after in zip(kept, self.reloaded.model.layers, strict=True):
            yield before[index], after, index


def blocks_gone(outcome: Outcome) -> None:
    """Block Drop: one block of four."""
    assert len(outcome.blocks_dropped) == 1
    assert outcome.reloaded.config.num_hidden_layers == len(outcome.reloaded.model.layers) == 3


def layers_gone(outcome: Outcome) -> None:
    """Layer Drop: one MoE layer is skipped, and it is the right one (its block may be gone as a whole)."""
    assert len(outcome.dropped("LayerDropModifier")[0]) == 1
    skipped = {
        index
        for _, block, index in outcome.blocks()
        if any(isinstance(child, SkippedMoE) for child in block.children())
    }
    assert skipped == outcome.layers_dropped


def experts_gone(outcome: Outcome) -> None:
    """Expert Drop and REAP: the experts that should be gone are, and no router row is left behind."""
    for _, _, index in outcome.blocks():
        moe = find_topology(outcome.reloaded).moe_layers.get(_position(outcome, index))
        if moe is None:
            assert index in outcome.layers_dropped
            continue
        by_us = {e for dropped in outcome.dropped("ExpertDropModifier") for e in dropped.get(index, [])}
        by_reap = 2 if "reap" in outcome.order else 0
        if by_us and by_reap:
            # In one pass both may choose the same expert; one after the other, REAP takes a quarter of 6, 1.
            assert 4 <= moe.num_experts <= 6
        else:
            assert moe.num_experts == 8 - len(by_us) - by_reap
        router = outcome.reloaded.get_submodule(moe.router)
        assert router.weight.shape[0] == moe.num_experts


def experts_narrow(outcome: Outcome) -> None:
    """Expert Width: half of the channels of every expert that stayed, in what is there and in the config."""
    field = "intermediate_size" if outcome.base.config.model_type == "mixtral" else "moe_intermediate_size"
    assert getattr(outcome.reloaded.config, field) * 2 == getattr(outcome.base.config, field)
    for moe in find_topology(outcome.reloaded).moe_layers.values():
        experts = outcome.reloaded.get_submodule(moe.experts)
        linear = expert_modules(experts)
        widths = {expert.down_proj.in_features for expert in linear} or {experts.down_proj.shape[-1]}
        assert widths == {getattr(outcome.reloaded.config, field)}


def experts_quantized(outcome: Outcome) -> None:
    """Every expert that stayed is in 4 bit and computes nearly what the same expert did before."""
    bits = {scheme for _, experts in _quantized_experts(outcome) for scheme in _bits(experts)}
    assert bits == {4}


def all_but_experts_quantized(outcome: Outcome) -> None:
    """Attention is quantized in every block that stayed; experts are only if another modifier did it."""
    for block in outcome.model.model.layers:
        assert hasattr(block.self_attn.q_proj, "quantization_scheme")
    config = outcome.reloaded.config.quantization_config.quantization_config
    by_others = set(_QUANTIZERS) & set(outcome.order)
    assert bool(by_others) == any("experts" in t for g in config.config_groups.values() for t in g.targets)


def experts_of_some_layers_quantized(outcome: Outcome) -> None:
    """Experts of blocks 0 and 2 are in 4 bit, those of blocks 1 and 3 are not."""
    for index, experts in _quantized_experts(outcome, {0, 2}):
        assert _bits(experts) == {4}, index
    layers = find_topology(outcome.model).moe_layers
    for _, _, index in outcome.blocks():
        if index in {1, 3} - outcome.layers_dropped:
            experts = outcome.model.get_submodule(layers[_position(outcome, index)].experts)
            assert not any(hasattr(module, "quantization_scheme") for module in experts.modules())


def experts_in_two_schemes(outcome: Outcome) -> None:
    """Router-aware quantization: 4 or 8 bit, one of them per layer."""
    for _, experts in _quantized_experts(outcome):
        assert _bits(experts) in ({4}, {8})


def experts_smoothed(outcome: Outcome) -> None:
    """AWQ: experts are in 4 bit, and some were smoothed before."""
    assert list(_quantized_experts(outcome))
    norms = [
        torch.equal(before.post_attention_layernorm.weight, after.post_attention_layernorm.weight)
        for before, after, index in outcome.blocks()
        if index not in outcome.layers_dropped
    ]
    assert not all(norms)


def attention_smoothed(outcome: Outcome) -> None:
    """SmoothQuant: attention is quantized, and smoothed in every block that stayed; experts are not."""
    for block in outcome.model.model.layers:
        assert hasattr(block.self_attn.q_proj, "quantization_scheme")
    for before, after, index in outcome.blocks():
        assert not torch.equal(before.input_layernorm.weight, after.input_layernorm.weight), index
        norm, same = before.post_attention_layernorm.weight, after.post_attention_layernorm.weight
        assert torch.equal(norm, same) or {"awq", "calibration"} & set(outcome.order)


def experts_sparse(outcome: Outcome) -> None:
    """Two of every four weights of every expert that stayed are zero."""
    for weight in _weights(outcome):
        zeros = (weight.reshape(-1, 4) == 0).sum(dim=-1)
        assert (zeros >= 2).all()
        assert (zeros < 4).any()


def experts_sparse_by_ratio(outcome: Outcome) -> None:
    """Expert Sparsity: every expert that stayed has a share of zeros between the bounds around one half."""
    shares = [float((weight == 0).float().mean()) for weight in _weights(outcome)]
    assert min(shares) > 0.2 and sum(shares) / len(shares) > 0.4
    if not {"sparsegpt", "wanda", *_QUANTIZERS} & set(outcome.order):
        # Others set more weights to zero.
        assert max(shares) < 0.8


def routers_fitted(outcome: Outcome) -> None:
    """Router Calibration: never worse on held-out data; parts of layers that it says it kept moved."""
    (report,) = (r for r in outcome.model._trim_history if r.modifier == "RouterCalibrationModifier")
    stayed = {index for _, _, index in outcome.blocks()} - outcome.layers_dropped
    assert stayed <= report.layers.keys()
    assert report.divergence_after <= report.divergence_before
    for before, after, index in outcome.blocks():
        if index in stayed and report.layers[index].kept:
            assert not torch.equal(
                before.post_attention_layernorm.weight, after.post_attention_layernorm.weight
            )


def _weights(outcome: Outcome) -> list[torch.Tensor]:
    """One weight per projection and expert of every MoE layer that stayed, dequantized."""
    found = []
    for moe in find_topology(outcome.reloaded).moe_layers.values():
        experts = outcome.reloaded.get_submodule(moe.experts)
        linear = expert_modules(experts)
        if not linear:
            found += [weight for weights in experts.parameters() if weights.ndim == 3 for weight in weights]
        for projection in (child for expert in linear for child in expert.children()):
            unit = torch.eye(projection.in_features, dtype=outcome.base.dtype)
            found.append(projection(unit).T)
    assert found
    return found


def _position(outcome: Outcome, index: int) -> int:
    """Index among the blocks that stayed."""
    return index - sum(dropped < index for dropped in outcome.blocks_dropped)


def _quantized_experts(
    outcome: Outcome, among: Container[int] = range(4)
) -> Iterator[tuple[int, list[nn.Module]]]:
    """(original block index, experts) of every MoE layer that stayed, after looking at every expert.

    Without smoothing or pruning in the recipe each must give nearly what the expert with its original index gave.
    """
    inputs = torch.randn(32, outcome.base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(outcome.base.dtype)
    comparable = not {"awq", "sparsegpt", "wanda", "sparsity", "width"} & set(outcome.order)
    layers = find_topology(outcome.model).moe_layers
    for _, _, index in outcome.blocks():
        if index in outcome.layers_dropped or index not in among:
            continue
        experts = expert_modules(outcome.model.get_submodule(layers[_position(outcome, index)].experts))
        fused = outcome.base.get_submodule(find_topology(outcome.base).moe_layers[index].experts)
        assert experts
        for expert in experts:
            for projection in expert.children():
                assert torch.isfinite(projection.weight_scale).all() and (projection.weight_scale != 0).all()
            before = _fused_expert(fused, expert._original_expert_index, inputs)
            # Far under what another expert, or a scale that nobody set, would give (1.4 and more).
            change = (expert(inputs) - before).float().norm() / before.float().norm()
            assert change < 0.5 or not comparable, (index, float(change))
        yield index, experts


def _bits(experts: list[nn.Module]) -> set[int]:
    return {child.quantization_scheme.weights.num_bits for expert in experts for child in expert.children()}


def _fused_expert(fused: nn.Module, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    """What one expert of an unquantized fused module gives, [tokens, hidden]."""
    gate, up = nn.functional.linear(inputs, fused.gate_up_proj[expert]).chunk(2, dim=-1)
    return nn.functional.linear(nn.functional.silu(gate) * up, fused.down_proj[expert])
