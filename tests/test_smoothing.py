"""Mappings for AWQ and SmoothQuant: scaling along them must not change what a model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import support
import tiny_models
import torch
from compressed_tensors.quantization import disable_quantization
from compressed_tensors.utils import match_modules_set
from llmcompressor.core import reset_session
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.logarithmic_equalization import LogarithmicEqualizationModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQMapping
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, LayerDropModifier
from llmcompressor_moe.compat.llmcompressor.mappings import (
    awq_mappings,
    smoothquant_mappings,
    upstream_awq_mappings,
    upstream_smoothquant_mappings,
)
from llmcompressor_moe.compat.llmcompressor.pinning import pin_only_with_an_accelerator
from llmcompressor_moe.compat.llmcompressor.wrong_mappings import wrong_mappings
from llmcompressor_moe.modifiers.composition import join_recipe
from llmcompressor_moe.topology import find_topology

RIGHT = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "granitemoeshared",
    "llama4_text",
    "ernie4_5_moe",
    "afmoe",
)
WRONG = ("gemma4_text", "glm_moe_dsa", "inkling_text", "laguna")


@pytest.fixture(autouse=True)
def _fresh_session() -> Iterator[None]:
    yield
    reset_session()


def change(model: PreTrainedModel, sets: Sequence[tuple[list[nn.Module], list[nn.Module]]]) -> float:
    """Largest change of the logits, as a share of the largest logit, when every smoothed layer is divided by
    random scales and everything that the mapping balances is multiplied by them.
    """
    before = support.logits(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for smooth, balance in sets:
            (layer,) = smooth
            scales = 0.5 + 1.5 * torch.rand(balance[0].weight.shape[1], generator=generator)
            layer.weight /= scales if layer.weight.ndim == 1 else scales[:, None]
            if getattr(layer, "bias", None) is not None:
                layer.bias /= scales
            for reader in balance:
                reader.weight *= scales
    return float((support.logits(model) - before).abs().max() / before.abs().max())


def awq_sets(
    model: PreTrainedModel, mappings: list[AWQMapping]
) -> list[tuple[list[nn.Module], list[nn.Module]]]:
    """(smooth, balance) as AWQ resolves them; values and outputs of other widths are left out, as AWQ does."""
    return [
        (smooth, tree_leaves(balance))
        for mapping in mappings
        for smooth, *balance in match_modules_set(model, (mapping.smooth_layer, *mapping.balance_layers))
        if smooth[0].weight.shape[0] == tree_leaves(balance)[0].weight.shape[1]
    ]


def smoothquant_sets(
    model: PreTrainedModel, mappings: Sequence[Sequence]
) -> list[tuple[list[nn.Module], list[nn.Module]]]:
    return [
        (smooth, tree_leaves(balance))
        for mapping in mappings
        for *balance, smooth in match_modules_set(model, tree_leaves(mapping))
    ]


@pytest.mark.parametrize("family", RIGHT)
def test_awq_mappings_change_nothing(family: str) -> None:
    model = linearize_moe(tiny_models.build(family))
    sets = awq_sets(model, awq_mappings(model))
    readers = {id(reader) for _, balance in sets for reader in balance}
    for moe in find_topology(model).moe_layers.values():
        assert id(model.get_submodule(f"{moe.experts}.0").gate_proj) in readers
        assert any(id(module) in readers for module in model.get_submodule(moe.router).modules())
    assert change(model, sets) < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v2", "gpt_oss", "llama4_text"])
def test_upstreams_awq_mappings_change_routing(family: str) -> None:
    """Why there are mappings of our own. Once this fails, upstream's do."""
    model = linearize_moe(tiny_models.build(family))
    assert change(model, awq_sets(model, upstream_awq_mappings(model))) > 1e-2


@pytest.mark.parametrize("family", RIGHT)
def test_smoothquant_mappings_change_nothing(family: str) -> None:
    model = linearize_moe(tiny_models.build(family))
    sets = smoothquant_sets(model, smoothquant_mappings(model))
    assert len(sets) == len(find_topology(model).blocks)
    assert change(model, sets) < 1e-4


@pytest.mark.parametrize("family", ["olmoe", "glm4_moe", "gpt_oss", "granitemoe"])
def test_upstreams_smoothquant_mappings_change_routing(family: str) -> None:
    model = linearize_moe(tiny_models.build(family))
    assert change(model, smoothquant_sets(model, upstream_smoothquant_mappings(model))) > 1e-2


@pytest.mark.parametrize("family", WRONG)
def test_families_that_are_refused_would_be_changed(family: str, tmp_path: Path) -> None:
    model = linearize_moe(tiny_models.build(family))
    assert wrong_mappings(family, "AWQModifier") is not None
    assert change(model, awq_sets(model, awq_mappings(model))) > 1e-2
    changed = change(model, smoothquant_sets(model, smoothquant_mappings(model)))
    assert (changed > 1e-2) == (wrong_mappings(family, "SmoothQuantModifier") is not None)
    quantization = QuantizationModifier(scheme="W4A16", targets=[r"re:.*experts\.\d+\..*_proj$"])
    recipe = [BlockDropModifier(blocks=[1]), AWQModifier(), quantization]
    with pytest.raises(
        ValueError, match=f"AWQModifier with llm-compressor's own mappings changes .*{family}"
    ):
        support.trim(support.load(support.saved(family, tmp_path)), recipe)


QUANTIZED = r"re:.*(experts\.\d+\.(gate|up|down)|[qkvo])_proj$"
SMOOTHING: dict[str, Callable[[], Modifier]] = {
    "AWQ": lambda: AWQModifier(n_grid=4),
    "SmoothQuant": lambda: SmoothQuantModifier(),
}


@pytest.mark.parametrize("drop_first", [True, False])
@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_beside_a_drop_only_the_drop_changes_the_function(
    smoothing: str, pipeline: str, drop_first: bool, tmp_path: Path
) -> None:
    """With quantization switched off, what is left must compute what the drop alone leaves."""
    path = support.saved("olmoe", tmp_path)
    drops = [LayerDropModifier(layers=[2]), ExpertDropModifier(experts={0: [3], 1: [0]})]
    expected = support.logits(support.trim(support.load(path), drops, no_data=True))
    schemes = QuantizationModifier(scheme="W8A8", targets=[QUANTIZED])
    drops = [LayerDropModifier(layers=[2]), ExpertDropModifier(experts={0: [3], 1: [0]})]
    others = [SMOOTHING[smoothing](), schemes]
    recipe = [*drops, *others] if drop_first else [*others, *drops]
    model = support.trim(support.load(path), recipe, pipeline=pipeline)
    rounded = support.logits(model)
    model.apply(disable_quantization)
    exact = support.logits(model)
    assert not torch.allclose(rounded, exact, atol=1e-3, rtol=0)
    torch.testing.assert_close(exact, expected, atol=1e-3, rtol=0)


def test_subclasses_are_refused_like_their_base() -> None:
    model = linearize_moe(tiny_models.build("laguna"))
    with pytest.warns(DeprecationWarning):
        modifier = LogarithmicEqualizationModifier()
    with pytest.raises(ValueError, match=r"LogarithmicEqualizationModifier with .* changes .* 'laguna'"):
        join_recipe([modifier], SimpleNamespace(model=model))


def test_mappings_of_your_own_stay() -> None:
    model = linearize_moe(tiny_models.build("laguna"))
    own = [AWQMapping("re:.*v_proj$", ["re:.*o_proj$"])]
    modifier = AWQModifier(mappings=own)
    join_recipe([modifier], SimpleNamespace(model=model))
    assert modifier.mappings == own


@pytest.mark.parametrize("first", [True, False])
def test_either_order_gets_the_same_mappings(first: bool) -> None:
    """Whether the other modifier was initialized before ours or comes after."""
    model = linearize_moe(tiny_models.build("olmoe"))
    state = SimpleNamespace(model=model, data=SimpleNamespace(calib=[1]))
    awq, smoothquant = AWQModifier(), SmoothQuantModifier()
    others = [awq, smoothquant]
    if first:
        for modifier in others:
            modifier.initialize(state)
    join_recipe(others, state)
    if not first:
        for modifier in others:
            modifier.initialize(state)
    join_recipe(others, state)
    assert awq.mappings == awq_mappings(model)
    assert {mapping.smooth_name for mapping in smoothquant.resolved_mappings_} == {
        f"model.layers.{index}.input_layernorm" for index in range(4)
    }


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pinning works here")
def test_pinning_needs_an_accelerator() -> None:
    pin_only_with_an_accelerator()
    once = IntermediatesCache.pin_memory
    pin_only_with_an_accelerator()
    assert IntermediatesCache.pin_memory is once
    cache = IntermediatesCache(None, None)
    cache.append({"x": torch.ones(2)})
    with pytest.raises(RuntimeError, match="accelerator"):
        once.__wrapped__(cache, 0)
    cache.pin_memory(0)
    assert torch.equal(cache.fetch(0)["x"], torch.ones(2))
