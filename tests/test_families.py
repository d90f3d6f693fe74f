"""Every family of transformers that uses the experts interface: detected, cut, saved, reloaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import support
import support_table
import tiny_models
import torch
import transformers
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from serving.families import ARCHITECTURES, NOT_SERVED
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmcompressor_moe import BlockDropModifier
from llmcompressor_moe.families import refused_families
from llmcompressor_moe.inspection import inspect_model
from llmcompressor_moe.modifiers.composition import check_recipe
from llmcompressor_moe.topology import NotAnMoEError, Topology, find_topology


@pytest.mark.parametrize("model_type", tiny_models.buildable())
def test_family_does_what_the_support_table_says(model_type: str, tmp_path: Path) -> None:
    found = support_table.marks(model_type, support_table.row(model_type, tmp_path))
    assert found == support_table.written_rows()[model_type]


def test_support_table_lists_every_family() -> None:
    walked = {family.model_type for family in tiny_models.families()}
    assert walked == {*support_table.written_rows(), *tiny_models.unbuildable()}


def test_support_table_is_what_its_generator_writes() -> None:
    rows = support_table.written_rows()
    assert support_table.DOCUMENT.read_text() == support_table.render(rows)
    assert len(rows) == len(ARCHITECTURES) + len(NOT_SERVED)
    assert set(rows) == {*ARCHITECTURES, *NOT_SERVED}


@pytest.mark.parametrize("model_type", tiny_models.buildable())
def test_topology_is_found(model_type: str) -> None:
    model = tiny_models.build(model_type)
    topology = find_topology(model)
    assert len(topology.blocks) == 4
    assert topology.moe_layers
    for layer in topology.moe_layers.values():
        assert layer.num_experts == 8
        # Llama 4 and ZAYA route to one expert.
        assert layer.top_k == (1 if model_type in ("llama4_text", "zaya") else 2)
        assert layer.router is not None
        if not layer.inline:
            children = {name for name, _ in model.get_submodule(layer.module).named_children()}
            has_shared = any("shared" in name and "gate" not in name for name in children)
            assert bool(layer.shared_experts) == has_shared
    check_that_routers_are_out_of_reach(model, topology)


def check_that_routers_are_out_of_reach(model: PreTrainedModel, topology: Topology) -> None:
    """llm-compressor's modifiers that target all Linears are refused where routers or gates are Linears."""
    exposed = {
        name
        for layer in topology.moe_layers.values()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith(layer.router if layer.inline else layer.module)
        and (module.out_features in (1, 8) or re.search(r"\.(gate|router)\.", name))
    }
    for kind, fields in (
        (QuantizationModifier, {"scheme": "FP8_DYNAMIC"}),
        (SparseGPTModifier, {"sparsity": 0.5}),
    ):
        refused = None
        try:
            check_recipe([kind(targets=["Linear"], ignore=["lm_head"], **fields)], model)
        except ValueError as error:
            refused = str(error)
        assert bool(refused) == bool(exposed), refused or exposed
        if refused is not None:
            assert f"targets {len(exposed)} routers or gates" in refused
            # The way out that it names.
            entries = re.findall(r"'(re:[^']+)'", refused)
            check_recipe([kind(targets=["Linear"], ignore=["lm_head", *entries], **fields)], model)


@pytest.mark.parametrize(
    "architecture",
    [
        "SwitchTransformersForConditionalGeneration",
        "NllbMoeForConditionalGeneration",
        "DbrxForCausalLM",
        "JetMoeForCausalLM",
        "LongcatFlashForCausalLM",
        "Qwen3OmniMoeForConditionalGeneration",
    ],
)
def test_families_that_nothing_can_be_trimmed_of_are_refused_from_their_config(
    architecture: str, tmp_path: Path
) -> None:
    config = getattr(transformers, architecture).config_class()
    reason = refused_families()[config.model_type]
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(NotAnMoEError, match=f"cannot be trimmed: {re.escape(reason)}"):
        inspect_model(tmp_path)


def test_dense_model_is_told_apart() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=support.VOCAB,
    )
    with pytest.raises(NotAnMoEError, match="no MoE layer"):
        find_topology(LlamaForCausalLM(config))


@pytest.mark.parametrize(
    "family", ["qwen3_5_moe", "qwen3_next", "granitemoehybrid", "lfm2_moe", "nemotron_h", "kimi_linear"]
)
def test_a_hybrid_keeps_a_block_with_keys_and_values(family: str, tmp_path: Path) -> None:
    """transformers' forward asks the cache for its length. All blocks of the other kind may go."""
    path = support.saved(family, tmp_path)
    kinds = support.load(path).config.get_text_config().layer_types
    attention = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    others = [index for index, kind in enumerate(kinds) if kind in ("linear_attention", "conv")]
    with pytest.raises(ValueError, match="no block would be left that keeps keys and values"):
        support.trim(support.load(path), BlockDropModifier(blocks=attention), no_data=True)
    support.trim(
        support.load(path), BlockDropModifier(blocks=others), no_data=True, output_dir=str(tmp_path / "out")
    )
    trimmed = support.load(tmp_path / "out")
    assert trimmed.generate(support.token_ids(2), max_new_tokens=2).shape[0] == 2
