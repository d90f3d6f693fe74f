"""What single changes do to the output, measured in one pass, is what the changed models' own forwards say."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import one_rank
import pytest
import support
import tiny_models
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import PreTrainedModel

from llmcompressor_moe import open_moe
from llmcompressor_moe.profile.changes import (
    WithoutBlock,
    WithoutChannels,
    WithoutExperts,
    WithoutLayer,
)
from llmcompressor_moe.profile.forward import forwards
from llmcompressor_moe.profile.lockstep import Fork, run_lockstep
from llmcompressor_moe.profile.options import run_options
from llmcompressor_moe.profile.variants import Variant, divergence_of, passes_of
from llmcompressor_moe.surgery.bypass import bypass_block, bypass_moe
from llmcompressor_moe.surgery.experts import keep_experts, routing_parts
from llmcompressor_moe.surgery.width import keep_channels
from llmcompressor_moe.topology import MoELayer, expert_modules, find_topology


def own_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**batch, use_cache=False).logits.double() for batch in support.padded_batches()]


def divergence(intact: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    found = []
    for batch, ours, theirs in zip(support.padded_batches(), intact, other, strict=True):
        p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1)[batch["attention_mask"].bool()])
    return torch.cat(found).mean().item()


def cuts(moe: MoELayer) -> list[list[int]]:
    """The smallest cut and the largest, the same in each group; which experts go differs by layer."""
    size = moe.num_experts // moe.num_groups
    first = int(moe.module.split(".layers.")[1].split(".")[0])
    steps = (moe.num_experts - moe.min_experts) // moe.num_groups
    gone = [{(first + place) % size for place in range(count)} for count in sorted({1, steps})]
    return [[expert for expert in range(moe.num_experts) if expert % size not in places] for places in gone]


def layers_of(model: PreTrainedModel) -> dict[int, MoELayer]:
    """The first MoE layer and the last."""
    layers = find_topology(model).moe_layers
    return {index: layers[index] for index in (min(layers), max(layers))}


def variants_of(model: PreTrainedModel) -> list[Variant]:
    return [
        Variant(index, WithoutExperts(routing_parts(model, moe), kept))
        for index, moe in layers_of(model).items()
        for kept in cuts(moe)
    ]


# Softmax; groups, sigmoid and correction bias; rows for all experts; experts in the block; a state handed on.
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "llama4_text", "gemma4_text", "hy_v4"])
def test_experts_equal_a_model_that_was_cut(model_type: str) -> None:
    model = linearize_moe(tiny_models.build(model_type))
    intact, expected = own_logits(model), []
    for moe in layers_of(model).values():
        for kept in cuts(moe):
            cut = copy.deepcopy(model)
            keep_experts(cut, moe, kept)
            expected.append(divergence(intact, own_logits(cut)))
    found, tokens = divergence_of(model, support.padded_batches(), variants_of(model), description=None)
    assert tokens == 33 and max(expected) > 0.1
    assert found == pytest.approx(expected, abs=1e-5)
    for ours, theirs in zip(own_logits(model), intact, strict=True):
        assert torch.equal(ours, theirs), "the model is as it was"


def masks_of(model: PreTrainedModel, moe: MoELayer) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Routed experts without a few channels; and without many, and shared ones with half of theirs."""
    generator = torch.Generator().manual_seed(len(moe.module) + sum(map(ord, moe.module)))

    def mask(expert: torch.nn.Module, kept: int) -> torch.Tensor:
        width = expert.down_proj.in_features
        return torch.randperm(width, generator=generator) < kept

    routed = expert_modules(model.get_submodule(moe.experts))
    shared = {path: mask(model.get_submodule(path), 24) for path in moe.shared_experts}
    return [
        (torch.stack([mask(expert, kept) for expert in routed]), gone)
        for kept, gone in ((56, {}), (8, shared))
    ]


def narrow_variants_of(model: PreTrainedModel) -> list[Variant]:
    return [
        Variant(
            index, WithoutChannels(routed, {model.get_submodule(path): one for path, one in shared.items()})
        )
        for index, moe in layers_of(model).items()
        for routed, shared in masks_of(model, moe)
    ]


# Softmax; biases; rows for all experts; shared experts.
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_channels_equal_experts_that_were_cut(model_type: str) -> None:
    model = linearize_moe(tiny_models.build(model_type))
    intact, expected = own_logits(model), []
    for moe in layers_of(model).values():
        for routed, shared in masks_of(model, moe):
            cut = copy.deepcopy(model)
            experts = zip(expert_modules(cut.get_submodule(moe.experts)), routed, strict=True)
            for expert, kept in [*experts, *((cut.get_submodule(path), one) for path, one in shared.items())]:
                keep_channels(expert, kept.nonzero().flatten().tolist())
            expected.append(divergence(intact, own_logits(cut)))
    found, _ = divergence_of(model, support.padded_batches(), narrow_variants_of(model), description=None)
    assert min(expected) > 1e-4
    assert found == pytest.approx(expected, abs=1e-5)
    for ours, theirs in zip(own_logits(model), intact, strict=True):
        assert torch.equal(ours, theirs), "the model is as it was"


def test_channels_of_an_expert_are_silenced_in_one_call_of_it_for_all() -> None:
    model = linearize_moe(tiny_models.build("mixtral"))
    calls = []
    expert = model.model.layers[3].mlp.experts[0]
    handle = expert.register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    divergence_of(model, support.padded_batches(), narrow_variants_of(model), description=None)
    handle.remove()
    assert len(calls) == 1


def test_experts_that_are_fused_have_no_channels_to_silence() -> None:
    model = tiny_models.build("mixtral")
    change = WithoutChannels(torch.ones(8, 64, dtype=torch.bool))
    with pytest.raises(TypeError, match="only where experts are separate modules"):
        divergence_of(model, support.padded_batches(), [Variant(1, change)], description=None)


def test_layers_and_blocks_equal_a_model_without_them() -> None:
    model = linearize_moe(tiny_models.build("mixtral"))
    intact, expected, variants = own_logits(model), [], []
    for index, moe in layers_of(model).items():
        variants += [Variant(index, WithoutLayer(model, moe)), Variant(index, WithoutBlock())]
        for bypass, path in ((bypass_moe, moe.module), (bypass_block, f"model.layers.{index}")):
            cut = copy.deepcopy(model)
            bypass(cut.get_submodule(path))
            expected.append(divergence(intact, own_logits(cut)))
    found, _ = divergence_of(model, support.padded_batches(), variants, description=None)
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_layer_in_the_block_itself_cannot_be_skipped() -> None:
    model = tiny_models.build("gemma4_text")
    with pytest.raises(ValueError, match="skip the whole block"):
        WithoutLayer(model, find_topology(model).moe_layers[0])


def test_opened_models_and_hidden_states_in_files(tmp_path: Path) -> None:
    path = support.saved("mixtral", tmp_path)
    model = linearize_moe(support.load(path))
    variants = [*variants_of(model), *narrow_variants_of(model)]
    expected, _ = divergence_of(model, support.padded_batches(), variants, description=None)
    with run_options(max_memory=0, scratch=tmp_path, wave_tokens=30):
        opened = open_moe(path)
        variants = [*variants_of(opened), *narrow_variants_of(opened)]
        found, _ = divergence_of(opened, support.padded_batches(), variants, description=None)
    assert found == pytest.approx(expected, abs=1e-5)


def test_two_ranks_measure_what_one_measures(tmp_path: Path) -> None:
    base = support.saved("mixtral", tmp_path)
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        assert support.run_forked(one_rank.main, base, out, "curves", ranks=ranks) == [0] * ranks
        found += [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(ranks)]
    one, first, second = found
    assert first == second
    assert first["tokens"] == one["tokens"] == 8 * 24
    assert first["nats"] == pytest.approx(one["nats"], rel=1e-5)


def test_a_variant_computes_from_its_block_on() -> None:
    model = linearize_moe(tiny_models.build("mixtral"))
    calls = dict.fromkeys(range(4), 0)
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(
            lambda *_args, index=index: calls.__setitem__(index, calls[index] + 1)
        )
    variants = [Variant(index, WithoutBlock()) for index in (1, 3, 3)]
    batches = support.padded_batches()
    with forwards(model):
        run_lockstep(
            model,
            batches,
            on_logits=lambda *_: None,
            forks=[Fork(batch, v.block, v.change) for batch in range(3) for v in variants],
        )
    assert calls == {0: 3, 1: 3, 2: 6, 3: 6}
    assert passes_of([1, 3, 3], 4) == 1 + 3 / 4 + 1 / 4 + 1 / 4


def test_what_a_change_puts_in_place_goes_with_an_exception() -> None:
    model = linearize_moe(tiny_models.build("deepseek_v3"))
    parts = routing_parts(model, find_topology(model).moe_layers[3])

    def fail(*_args) -> None:
        raise ZeroDivisionError

    handle = model.model.layers[3].mlp.experts[0].register_forward_hook(fail)
    with contextlib.suppress(ZeroDivisionError):
        divergence_of(model, support.padded_batches(), variants_of(model), description=None)
    handle.remove()
    for module in model.modules():
        assert not set(module.__dict__) & {*module._parameters, *module._buffers}
    assert parts.counts and {getattr(module, name) for module, name in parts.counts} == {parts.num_experts}


def test_nobody_watches_experts_of_forks() -> None:
    model = tiny_models.build("mixtral")
    forks = [Fork(0, 1, WithoutBlock())]
    with pytest.raises(ValueError, match="on_wave with forks"):
        run_lockstep(model, support.padded_batches(), forks=forks, on_wave=lambda _: None)
