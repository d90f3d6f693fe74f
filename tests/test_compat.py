"""What we take from upstream behind its back: that it is still there, that it is still needed, and that nothing
outside of `llmcompressor_moe.compat` does so, too.

A failing test here after an upgrade names the entry to adapt, or to remove because upstream does without it now.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmcompressor.core.lifecycle
import lm_eval.tasks._yaml_loader
import peft.tuners.tuners_utils
import peft.utils.transformers_weight_conversion as weight_conversion
import pytest
import tiny_models
import torch
import tqdm
from compressed_tensors.compressors import ModelCompressor, compress_module
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.offload.cache import CPUCache, DiskCache
from compressed_tensors.offload.cache.base import OffloadCache
from compressed_tensors.quantization import QuantizationArgs, forward_quantize, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle import forward
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from llmcompressor.args import ModelArguments
from llmcompressor.core import CompressionLifecycle, active_session, session_functions
from llmcompressor.core.events import Event, EventType
from llmcompressor.core.session import CompressionSession
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modeling.moe import helpers, linear_experts, linearize
from llmcompressor.modeling.moe.linear_experts import ExpertMLPWithGate, LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes, linearize_moe, load_quantizable_moe
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.pruning import (
    ConstantPruningModifier,
    MagnitudePruningModifier,
    SparseGPTModifier,
    WandaPruningModifier,
)
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.utils.pytorch import LayerParamMasking
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq import base as awq_base
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained
from llmcompressor.utils.helpers import disable_lm_head
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3OmniMoeTalkerConfig,
    Trainer,
    conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.integrations.heterogeneity.configuration_utils import (
    AmbiguousGlobalPerLayerAttributeError,
    HeterogeneousConfigMixin,
    _PerLayerConfigView,
)
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from llmcompressor_moe import compat
from llmcompressor_moe.architectures import DeepseekForCausalLM
from llmcompressor_moe.compat.compressed_tensors import caches_of, decompress_in, is_offloaded, scratch_file
from llmcompressor_moe.compat.llmcompressor import calibration
from llmcompressor_moe.compat.llmcompressor.awq import each_in_its_own_scheme
from llmcompressor_moe.compat.llmcompressor.linear_experts import (
    between_layers,
    fused_class,
    linearize_without_weights,
    restore_checkpoint_names,
    was_fused,
)
from llmcompressor_moe.compat.llmcompressor.lm_head import lm_head_in_place
from llmcompressor_moe.compat.llmcompressor.mappings import (
    upstream_awq_mappings,
    upstream_smoothquant_mappings,
)
from llmcompressor_moe.compat.llmcompressor.recipes import known_modifiers, load_modifiers
from llmcompressor_moe.compat.llmcompressor.saving import mark_wrapped
from llmcompressor_moe.compat.llmcompressor.training import active, training_session
from llmcompressor_moe.compat.lm_eval import yaml_loader
from llmcompressor_moe.compat.peft import adapt_exactly
from llmcompressor_moe.compat.transformers import conversions
from llmcompressor_moe.compat.transformers.building import (
    blocks_built_by,
    build,
    class_for,
    class_named,
    initialize,
)
from llmcompressor_moe.compat.transformers.conversions import (
    convert_like,
    not_after,
    own_conversions,
    own_mappings,
    save_by,
    saved_as,
    source_patterns,
)
from llmcompressor_moe.compat.transformers.models import (
    can_choose_experts,
    checkpointing_function,
    complete_configs,
)
from llmcompressor_moe.compat.transformers.per_layer import (
    allow_global_access,
    general_value,
    has_general_value,
    layer_overrides,
    says_that_none_differs,
    tolerant_lookups,
)
from llmcompressor_moe.compat.transformers.quantizer import needs_no_initialization, prepared_before_weights
from llmcompressor_moe.compat.transformers.trainer import SteppedTrainer
from llmcompressor_moe.surgery.repack import fused_experts

SOURCES = Path(compat.__file__).parents[1]
UPSTREAM = ("llmcompressor", "compressed_tensors", "transformers", "peft", "lm_eval")
# See the docstring of `llmcompressor_moe.compat`.
PUBLIC = {
    "_no_split_modules",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_save",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_load_missing",
    "_name_or_path",
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_non_persistent_buffers_set",
    "_last_lr",
}

DEFINED_BY_MODELS = {"_no_split_modules", "_can_record_outputs", "_init_weights"}

ATTRIBUTE_FUNCTIONS = ("getattr", "hasattr", "setattr", "delattr", "patch_attr")


def arguments(function: Callable[..., Any]) -> list[str]:
    """Names of a function's parameters."""
    return list(inspect.signature(function).parameters)


def upstream_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as upstream wrote it, whether or not it has been wrapped here."""
    return inspect.unwrap(function)


def uneven() -> PreTrainedConfig:
    """A config with one layer that has fewer experts."""
    config = tiny_models.tiny_config("mixtral", num_layers=2)
    config.per_layer_config = {1: {"num_local_experts": 4}}
    return config


# Versions


def packages() -> list[str]:
    return [name for _, name, _ in pkgutil.iter_modules(compat.__path__)]


@pytest.mark.parametrize("name", packages())
def test_installed_versions_are_those_that_were_checked(name: str) -> None:
    requirement = Requirement(importlib.import_module(f"{compat.__name__}.{name}").HOLDS_FOR)
    assert requirement.name.replace("-", "_") == name
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name))


# The rule


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def is_upstream(module: str | None) -> bool:
    return (module or "").partition(".")[0] in UPSTREAM


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCES.rglob("*.py")):
        if path.relative_to(SOURCES).parts[0] != "compat":
            yield str(path.relative_to(SOURCES)), ast.parse(path.read_text())


@functools.cache
def own_names() -> set[str]:
    """Private names that our own code outside of `compat` gives to something."""
    found = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return {name for name in found if private(name)}


def upstream_names(tree: ast.Module) -> set[str]:
    """What a file calls the classes, functions and modules of upstream."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_upstream(node.module):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.asname or alias.name.partition(".")[0]
                for alias in node.names
                if is_upstream(alias.name)
            }
    return found


def root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def violations(tree: ast.Module) -> Iterator[str]:
    """Uses of private upstream names and assignments onto upstream's objects."""
    theirs = upstream_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_upstream(node.module):
            if any(private(part) for part in node.module.split(".")):
                yield f"{node.lineno}: from {node.module}"
            yield from (f"{node.lineno}: import {a.name}" for a in node.names if private(a.name))
        elif isinstance(node, ast.Import):
            yield from (
                f"{node.lineno}: import {a.name}"
                for a in node.names
                if is_upstream(a.name) and any(private(part) for part in a.name.split("."))
            )
        elif isinstance(node, ast.Attribute):
            base = root(node.value)
            extends = ast.unparse(node.value) == "super()" and node.attr in DEFINED_BY_MODELS
            if private(node.attr) and node.attr not in PUBLIC and not extends:
                ours = node.attr in own_names() and base not in theirs
                if not ours or (base not in ("self", "cls") and node.attr in upstream_private_names()):
                    yield f"{node.lineno}: {ast.unparse(node)}"
            elif not isinstance(node.ctx, ast.Load) and base in theirs:
                yield f"{node.lineno}: {ast.unparse(node)} ="
        elif isinstance(node, ast.Call) and root(node.func) in ATTRIBUTE_FUNCTIONS and len(node.args) > 1:
            owner, name, *_ = node.args
            if root(node.func) in ("setattr", "delattr", "patch_attr") and root(owner) in theirs:
                yield f"{node.lineno}: {ast.unparse(node)}"
            literal = name.value if isinstance(name, ast.Constant) else ""
            if private(literal) and (literal in upstream_private_names() or not is_own_mark(literal)):
                yield f"{node.lineno}: {ast.unparse(node)}"


@functools.cache
def upstream_private_names() -> set[str]:
    """Private names of the upstream classes that we work with, but for those that count as public."""
    found: set[str] = set()
    for cls in (
        GPTQModifier,
        SparseGPTModifier,
        WandaPruningModifier,
        CompressionSession,
        CompressionLifecycle,
        ModifierFactory,
        LinearExperts2D,
        IntermediatesCache,
        PreTrainedModel,
        PreTrainedConfig,
        Trainer,
        CompressedTensorsHfQuantizer,
        WeightConverter,
    ):
        for base in cls.__mro__:
            if is_upstream(base.__module__):
                found |= {
                    *vars(base),
                    *inspect.get_annotations(base),
                    *vars(base).get("__private_attributes__", {}),
                }
    return {name for name in found if private(name)} - PUBLIC


def is_own_mark(name: str) -> bool:
    return name in own_names() | PUBLIC


def test_nothing_else_uses_private_names_or_patches() -> None:
    found = [f"{path}:{violation}" for path, tree in sources() for violation in violations(tree)]
    assert not found, "move these into llmcompressor_moe.compat:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.x import _y",
        "from transformers._x import y",
        "import lm_eval._x",
        "model._keys_to_forget",
        "getattr(model, '_keys_to_forget', None)",
        "from transformers import Trainer\nTrainer.train = None",
        "from transformers import Trainer\nsetattr(Trainer, name, None)",
        "import transformers.trainer as t\nwith patch_attr(t, 'Trainer', None): pass",
        "import llmcompressor.core\ndel llmcompressor.core.Event",
        "gptq._num_samples",
        "model._init_weights(module)",
    ],
)
def test_the_rule_sees(source: str) -> None:
    assert list(violations(ast.parse(source)))


def test_no_class_of_ours_overrides_a_private_name() -> None:
    found = []
    for module in pkgutil.walk_packages([str(SOURCES)], "llmcompressor_moe."):
        if module.name.startswith(compat.__name__) or module.name.endswith(("__main__", "vllm_runner")):
            continue
        for cls in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(cls) or cls.__module__ != module.name:
                continue
            bases = [base for base in cls.__mro__[1:] if is_upstream(base.__module__)]
            names = {name for base in bases for name in vars(base) if private(name) and name[1] != "_"}
            # Abstract base classes and pydantic keep books in every class.
            names = {name for name in names if not name.startswith(("_abc_", "_pydantic"))}
            # transformers remembers answers on the class that was asked.
            names = {name for name in names if not name.endswith("_cached_value")}
            if issubclass(cls, PreTrainedModel):
                names -= DEFINED_BY_MODELS
            found += [f"{module.name}.{cls.__name__}.{name}" for name in names & set(vars(cls))]
    assert not found


# compressed-tensors


def test_offloaded_parameters_are_in_a_cache() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert not is_offloaded(model)
    assert {"offload_device", "onload_device"} <= set(
        [*vars(OffloadCache), *OffloadCache.__annotations__, *arguments(OffloadCache.__init__)]
    )


def test_disk_caches_touch_files_of_their_own_prefix_only(tmp_path: Path) -> None:
    assert DiskCache._is_ct_file_path(str(scratch_file(tmp_path, "changed_3")))
    assert not DiskCache._is_ct_file_path(str(tmp_path / "changed_3.safetensors"))


@pytest.mark.parametrize("preset", ["NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_fp4_and_mx_weights_are_decompressed_to_bfloat16(preset: str) -> None:
    """Not ours: they get the model's dtype. Upstream's classes are as they were afterwards."""
    scheme = preset_name_to_scheme(preset, ["Linear"])

    def compressed() -> nn.Module:
        linear = nn.Linear(32, 16, bias=False, dtype=torch.float16)
        initialize_module_for_quantization(linear, scheme)
        linear.weight_scale.data.fill_(0.25)
        compress_module(linear)
        return nn.Sequential(linear)

    owners = (NVFP4PackedCompressor, MXFP8QuantizationCompressor)
    before = [vars(owner)["decompress"] for owner in owners]
    for dtype in (torch.bfloat16, torch.float16):
        assert ModelCompressor().decompress_model(stock := compressed()) is None
        assert stock[0].weight.dtype == torch.bfloat16, "upstream knows the model's dtype now"
        compressor = ModelCompressor()
        decompress_in(compressor, dtype, lambda stored, scheme, dtype: torch.full((16, 32), 7, dtype=dtype))
        compressor.decompress_model(ours := compressed())
        assert ours[0].weight.dtype == dtype
        assert (ours[0].weight == 7).all() == (dtype == torch.float16)
        assert torch.equal(ours[0].weight_scale, stock[0].weight_scale)
    assert [vars(owner)["decompress"] for owner in owners] == before


def test_tokens_without_a_batch_share_a_scale() -> None:
    """Not ours: each has its own, as with a batch."""
    args = preset_name_to_scheme("W8A8", ["Linear"]).input_activations
    value = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[:, None]
    ours = forward.compute_dynamic_scales_and_zp
    theirs = inspect.unwrap(ours)
    module = nn.Linear(8, 1)
    batched, zero_points = theirs(value[None], args, module)
    assert batched.shape == (1, 5, 1) and theirs(value, args, module)[0].numel() == 1, (
        "upstream scales each token"
    )
    scale, zero_point = ours(value, args, module)
    assert torch.equal(scale, batched[0]) and torch.equal(zero_point, zero_points[0])
    assert torch.equal(ours(value[None], args, module)[0], batched)


# peft, lm-eval


def test_peft_still_rewrites_what_is_adapted() -> None:
    assert arguments(weight_conversion.convert_peft_config_for_transformers)[:2] == ["peft_config", "model"]
    # Imported where it is called, so that it can be replaced.
    assert "convert_peft_config_for_transformers" in inspect.getsource(peft.tuners.tuners_utils)
    assert not hasattr(peft.tuners.tuners_utils, "convert_peft_config_for_transformers")

    def adapted(adapt: Callable[..., Any]) -> set[str]:
        model = tiny_models.build("qwen3_moe", num_layers=1)
        linearize_moe(model)
        config = LoraConfig(r=2, target_modules=["model.layers.0.mlp.experts.0.down_proj"])
        names = (name for name, _ in adapt(model, config).named_parameters() if "lora_A" in name)
        return {name.partition(".lora_A")[0].removeprefix("base_model.model.") for name in names}

    assert adapted(adapt_exactly) == {"model.layers.0.mlp.experts.0.down_proj"}
    try:
        differs = adapted(get_peft_model) != {"model.layers.0.mlp.experts.0.down_proj"}
    except (ValueError, AttributeError, RuntimeError):
        differs = True
    assert differs, "peft adapts what it is asked to: `adapt_exactly` is no longer needed"


def test_lm_eval_reads_definitions_by_that_function() -> None:
    assert yaml_loader() is lm_eval.tasks._yaml_loader.load_yaml
    assert {"path", "resolve_func"} <= set(arguments(yaml_loader()))


# transformers: configs whose layers differ


def test_general_values_are_not_to_be_had_plainly() -> None:
    config = uneven()
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
        _ = config.num_local_experts
    assert general_value(config, "num_local_experts") == 8
    assert general_value(config, "no_such_thing", 3) == 3 and general_value(config, "no_such_thing") is None
    assert has_general_value(config, "num_local_experts") and not has_general_value(config, "no_such_thing")


def test_overrides_stand_in_the_spec_only() -> None:
    config = uneven()
    assert layer_overrides(config) == {1: {"num_local_experts": 4}} and not says_that_none_differs(config)
    config.per_layer_config = {}
    assert layer_overrides(config) == {} and says_that_none_differs(config)
    config.per_layer_config = None
    assert layer_overrides(config) == {} and not says_that_none_differs(config)


def test_transformers_writes_the_permission() -> None:
    update = upstream_own(HeterogeneousConfigMixin._update_heterogeneous_to_dict_output)
    assert arguments(update) == ["self", "d"]
    config = uneven()
    allow_global_access(config)
    assert config.num_local_experts == 8
    assert "allow_global_per_layer_attribute_access" not in config.to_dict()
    written = {"allow_global_per_layer_attribute_access": True}
    update(config, written)
    assert "allow_global_per_layer_attribute_access" in written, (
        "`allow_global_access` need not patch any more"
    )


def test_configs_of_a_kind_of_layers_are_refused() -> None:
    assert arguments(_PerLayerConfigView.__init__) == ["self", "config"]
    assert arguments(_PerLayerConfigView.__getitem__) == ["self", "layer_idx"]
    config, plain = uneven(), tiny_models.tiny_config("mixtral", num_layers=2)
    config.layer_types = plain.layer_types = ["full_attention"] * 2
    with pytest.raises(ValueError, match="not homogeneous"):
        _ = config.per_layer_config["full_attention"]
    with tolerant_lookups(lambda _: plain):
        assert config.per_layer_config["full_attention"] is plain
        assert config.per_layer_config[1].num_local_experts == 4
        assert config.num_local_experts == 8
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
        _ = config.num_local_experts


# transformers: names in checkpoints


def test_registered_conversions_hide_a_familys_own() -> None:
    own = own_conversions("mixtral")
    before = conversion_mapping._checkpoint_conversion_mapping_cache
    try:
        conversion_mapping.register_checkpoint_conversion_mapping("mixtral", [], overwrite=True)
        assert conversion_mapping.get_checkpoint_conversion_mapping("mixtral") == []
        assert len(own_conversions("mixtral")) == len(own) > 0
        with own_mappings():
            assert len(conversion_mapping.get_checkpoint_conversion_mapping("mixtral")) == len(own)
        assert conversion_mapping.get_checkpoint_conversion_mapping("mixtral") == []
    finally:
        conversion_mapping.register_checkpoint_conversion_mapping("mixtral", own, overwrite=True)
    assert before is None or before is conversion_mapping._checkpoint_conversion_mapping_cache


def test_registered_conversions_are_not_restored_but_those_like_anothers_are() -> None:
    assert own_conversions("deepseek") is not None
    conversion_mapping.register_checkpoint_conversion_mapping("unheard_of", own_conversions("mixtral"))
    assert own_conversions("unheard_of") is None, "`convert_like` needs no private name"
    convert_like("unheard_of", "mixtral")
    assert len(own_conversions("unheard_of")) == len(own_conversions("mixtral"))
    del conversion_mapping._MODEL_TO_CONVERSION_PATTERN["unheard_of"]
    conversions._own_table.cache_clear()
    del conversion_mapping._checkpoint_conversion_mapping_cache["unheard_of"]
    conversion_mapping.USER_REGISTERED_MAPPINGS.remove("unheard_of")


def test_saving_reverses_what_a_model_was_loaded_by() -> None:
    model = tiny_models.build("mixtral", num_layers=1)
    save_by(model, [])
    state = model.state_dict()
    assert revert_weight_conversion(model, dict(state)).keys() == state.keys()
    save_by(model, conversion_mapping.get_model_conversion_mapping(model))
    assert revert_weight_conversion(model, dict(state)).keys() != state.keys()


@pytest.mark.parametrize("family", ["axk2", "hy_v4", "minimax_m3_vl"])
def test_names_of_saved_tensors_are_those_that_saving_gives(family: str) -> None:
    model = tiny_models.on_meta(family)
    state = model.state_dict()
    written, saved = revert_weight_conversion(model, dict(state)), saved_as(model)
    renamed = {name: new for name in state for new, rule in [saved(name)] if rule is None}
    assert any(name != new for name, new in renamed.items())
    assert all(written[new].shape == state[name].shape for name, new in renamed.items())


def test_a_conversion_that_looks_at_what_stands_before() -> None:
    rule = next(c for c in own_conversions("minimax_m3_vl")[::-1] if isinstance(c, WeightConverter))
    dense, expert = "layers.10.mlp.gate_proj.weight", "layers.10.mlp.experts.7.gate_proj.weight"
    assert rule.rename_source_key(dense)[1] and rule.rename_source_key(expert)[1]
    guarded = not_after(rule, [r"\.experts\.\d"])
    assert guarded.rename_source_key(dense)[0] == rule.rename_source_key(dense)[0]
    assert guarded.rename_source_key(expert) == (expert, None)


def test_patterns_are_rewritten() -> None:
    converter = next(c for c in own_conversions("mixtral") if isinstance(c, WeightConverter))
    assert any("experts.*." in pattern for pattern in source_patterns(converter))


# transformers: loading compressed weights


def test_the_quantizers_steps() -> None:
    quantizer = CompressedTensorsHfQuantizer
    assert arguments(quantizer._process_model_before_weight_loading) == ["self", "model", "kwargs"]
    assert arguments(quantizer.update_weight_conversions) == ["self", "weight_conversions"]
    assert arguments(quantizer._convert_model_for_quantization) == ["self", "model"]
    # Put onto the class, and taken off again.
    assert "_convert_model_for_quantization" not in vars(quantizer)
    before = dict(vars(quantizer))
    with prepared_before_weights(lambda *_: None, lambda _: False, lambda conversion: conversion):
        assert "_convert_model_for_quantization" in vars(quantizer)
    assert dict(vars(quantizer)) == before


def test_the_quantizer_knows_one_scheme_for_all_experts() -> None:
    convert = upstream_own(CompressedTensorsHfQuantizer.update_weight_conversions)
    assert "get_experts_scheme" in inspect.getsource(convert), (
        "do schemes differ by expert in transformers now?"
    )


def test_modules_that_transformers_leaves_alone() -> None:
    model = tiny_models.build("mixtral", num_layers=1)
    assert "_is_hf_initialized" in inspect.getsource(PreTrainedModel._initialize_weights)
    module = model.model.norm
    with torch.no_grad():
        module.weight.fill_(3)
    needs_no_initialization(module)
    model._initialize_weights(module)
    assert (module.weight == 3).all()


# transformers: building models


def test_blocks_are_built_as_asked() -> None:
    assert arguments(PreTrainedModel.__init__)[:2] == ["self", "config"]
    assert arguments(PreTrainedModel.post_init) == ["self"]
    config = tiny_models.tiny_config("mixtral", num_layers=2)
    block = type(build(MixtralForCausalLM, config).model.layers[0])
    original, built, checked = block.__init__, [], []

    def make(init: Callable[..., None]) -> Callable[..., None]:
        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            built.append(self)

        return replaced

    with blocks_built_by(lambda cls, _: {block}, make, checked.append):
        model = build(MixtralForCausalLM, config)
    assert built == list(model.model.layers) and checked[-1] is model
    assert block.__init__ is original
    assert vars(PreTrainedModel)["post_init"].__qualname__ == "PreTrainedModel.post_init"


def test_transformers_builds_all_layers_alike() -> None:
    config = uneven()
    allow_global_access(config)
    model = build(MixtralForCausalLM, config)
    counts = [layer.mlp.experts.num_experts for layer in model.model.layers]
    assert counts == [8, 8], "transformers builds models from `per_layer_config`: `blocks_built_by` can go"


def test_classes_know_how_to_build_themselves() -> None:
    config = tiny_models.tiny_config("mixtral", num_layers=1)
    config.dtype = torch.bfloat16
    assert build(MixtralForCausalLM, config).dtype == torch.bfloat16
    assert not hasattr(MixtralForCausalLM, "from_config"), "`build` can go"
    assert class_for(AutoModelForCausalLM, MixtralConfig) is MixtralForCausalLM
    assert class_for(AutoModelForCausalLM, PreTrainedConfig) is None
    assert class_named("MixtralForCausalLM") is MixtralForCausalLM
    assert class_named("DeepseekForCausalLM") is DeepseekForCausalLM
    assert class_named("AutoModelForCausalLM") is None and class_named("") is None


def test_models_say_whether_experts_can_be_chosen() -> None:
    assert can_choose_experts(tiny_models.build("mixtral", num_layers=1))
    assert not can_choose_experts(tiny_models.build("llama4_text", num_layers=1))


def test_the_thinkers_config_lacks_a_field() -> None:
    config = tiny_models.tiny_config("qwen3_omni_moe_thinker")
    assert "vision_start_token_id" not in config.to_dict(), "transformers has the field: ours may go"
    complete_configs()
    assert config.vision_start_token_id == Qwen3OmniMoeTalkerConfig().vision_start_token_id


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_hides_its_keywords(reentrant: bool) -> None:
    model = tiny_models.build("mixtral", num_layers=1)
    assert checkpointing_function(model.model.norm) is None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    functions = [f for f in map(checkpointing_function, model.modules()) if f is not None]
    assert functions and all(f.keywords["use_reentrant"] is reentrant for f in functions)


# transformers: Trainer


@pytest.mark.parametrize(
    "name",
    [name for name in vars(SteppedTrainer) if private(name)],
)
def test_the_trainers_steps(name: str) -> None:
    theirs, ours = arguments(getattr(Trainer, name)), arguments(getattr(SteppedTrainer, name))
    assert theirs == ours or ours == ["self", "arguments", "options"]
    # Trainer itself takes the step.
    assert f"self.{name}(" in inspect.getsource(Trainer)


def test_the_trainer_takes_no_callback_for_them() -> None:
    clip = inspect.getsource(Trainer._clip_grad_norm)
    assert "callback_handler" not in clip, "gradients are told to callbacks: `gradient_clipped` may go"
    assert arguments(Trainer._get_learning_rate) == ["self"]


# llm-compressor: linearized experts


def test_step_has_experts_without_the_decorator_and_a_limit_of_their_layer() -> None:
    assert upstream_own(helpers.get_use_experts_implementation_args)(Step3p7Experts) is None
    model = tiny_models.build("step3p7")
    linearize_moe(model)
    limits = [experts.limit for _, experts in linearize.get_linearized_moes(model)]
    assert limits == [float("inf"), float("inf"), 0.5]
    plain = linear_experts.MoEConfig.from_config(model.config.get_text_config())
    assert plain.limit is None, "llm-compressor knows the limit"


def test_llama4_is_linearized_as_a_part_only() -> None:
    experts = next(
        m for m in tiny_models.build("llama4_text").modules() if type(m).__name__.endswith("Experts")
    )
    config = tiny_models.tiny_config("llama4_text")
    with pytest.raises(AttributeError, match="text_config"):
        Llama4LinearExperts.from_experts_module(experts, config)
    registered = LinearExperts2D._registry[type(experts)]
    linear = registered.from_experts_module(experts, config)
    assert fused_class(linear) is type(experts) and was_fused(linear)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "llama4_text"])
def test_experts_are_linearized_in_the_dtype_that_the_config_names(family: str) -> None:
    """Not ours: in the dtype that they have, as after `model.float()`."""
    model = tiny_models.build(family)
    model.config.dtype = torch.bfloat16
    name, experts = get_non_linearized_moes(model)[0]
    before = {key: value.clone() for key, value in experts.named_parameters()}
    linearize_moe(model)
    linear = model.get_submodule(name)
    assert {parameter.dtype for parameter in linear.parameters()} == {torch.float32}
    down = before["down_proj"][1]
    assert torch.equal(linear[1].down_proj.weight, down.T if experts.is_transposed else down)
    kind = type(linear[1])
    theirs = inspect.unwrap(kind.copy_from_experts_module)
    narrow = linear[0].to(torch.bfloat16)
    with torch.no_grad():
        theirs(narrow, experts, 0)
    assert narrow.down_proj.weight.dtype == torch.bfloat16, "upstream keeps what the config named"


@pytest.mark.parametrize("family", ["minimax_m3_vl_text", "ernie4_5_vl_moe"])
def test_experts_lose_their_settings_and_have_one_width(family: str) -> None:
    """Not ours: settings of the activation are kept, and each set of experts has the width that it has."""
    model = tiny_models.build(family)
    config = model.config.get_text_config()
    for name, experts in get_non_linearized_moes(model):
        hidden = torch.randn(6, tiny_models.HIDDEN, generator=torch.Generator().manual_seed(0))
        index, weights = torch.tensor([[0, 3]]).repeat(6, 1), torch.full((6, 2), 0.5)
        kind = LinearExperts2D.get_linear_experts_cls(type(experts))
        linear = kind.from_experts_module(experts, config)
        torch.testing.assert_close(linear(hidden, index, weights), experts(hidden, index, weights))
        with pytest.raises((AttributeError, TypeError)):
            # Past no_grad, which wraps upstream's own as well.
            theirs = LinearExperts2D.from_experts_module.__func__.__wrapped__
            theirs(kind, experts, config)(hidden, index, weights)
        with torch.no_grad():
            assert torch.equal(fused_experts(linear, type(experts), config).down_proj, experts.down_proj), (
                name
            )


def test_the_source_of_experts_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not ours: once per class, and what callers do to the result is theirs."""
    arguments = helpers.get_use_experts_implementation_args
    kinds = {type(experts) for _, experts in get_non_linearized_moes(tiny_models.build("gpt_oss"))}
    (kind,) = kinds
    first = arguments(kind)
    assert first["has_bias"] and first["is_transposed"]
    first.clear()
    reads = []
    read = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda cls: reads.append(cls) or read(cls))
    assert arguments(kind) == inspect.unwrap(arguments)(kind) and reads == [kind]
    assert linear_experts.get_use_experts_implementation_args is arguments
    assert arguments(torch.nn.Linear) is None


def test_the_class_of_fused_experts_is_noted() -> None:
    model = tiny_models.build("mixtral", num_layers=1)
    fused = type(model.model.layers[0].mlp.experts)
    linearize_moe(model)
    experts = model.model.layers[0].mlp.experts
    assert experts._source_experts_cls is fused is fused_class(experts) and was_fused(experts)
    del experts._source_experts_cls
    assert not was_fused(experts) and fused_class(experts) is fused, "read from the registry"


def test_what_stands_between_an_experts_layers() -> None:
    model = tiny_models.build("mixtral", num_layers=1)
    linearize_moe(model)
    expert = model.model.layers[0].mlp.experts[0]
    assert isinstance(expert, ExpertMLPWithGate)
    hidden = torch.randn(3, tiny_models.HIDDEN)
    between = between_layers(expert, expert.gate_proj(hidden), expert.up_proj(hidden))
    torch.testing.assert_close(expert.down_proj(between), expert(hidden))


def test_experts_without_weights_are_not_linearized() -> None:
    config = tiny_models.tiny_config("mixtral", num_layers=1)
    with torch.device("meta"):
        experts = build(MixtralForCausalLM, config).model.layers[0].mlp.experts
        linear = linearize_without_weights(experts, config)
        assert {p.device.type for p in linear.parameters()} == {"meta"}
        with pytest.raises(Exception, match="meta"):
            LinearExperts2D.get_linear_experts_cls(type(experts)).from_experts_module(experts, config)


def test_loading_linearized_changes_the_whole_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("qwen3_moe", num_layers=1)
    model.config.save_pretrained(tmp_path)
    # Loading itself would import every model of transformers.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)

    def registered() -> list[str]:
        found = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
        return [f"{type(c).__name__} {source_patterns(c)} {c._original_target_patterns}" for c in found]

    own = registered()
    with load_quantizable_moe():
        AutoModelForCausalLM.from_pretrained(tmp_path)
    try:
        assert registered() != own, "nothing is left behind: `restore_checkpoint_names` is no longer needed"
    finally:
        restore_checkpoint_names(model, fused=False)
    assert registered() == own


# llm-compressor: smoothing and calibration. `test_smoothing.py` holds every family of `wrong_mappings`.


def test_mappings_leave_routers_out() -> None:
    model = tiny_models.build("mixtral", num_layers=1)
    linearize_moe(model)
    named = [pattern for mapping in upstream_awq_mappings(model) for pattern in mapping.balance_layers]
    assert any("w1" in pattern or "gate_proj" in pattern for pattern in named)
    assert not any(pattern.endswith((".gate", ".gate$", "router")) for pattern in named)
    assert upstream_smoothquant_mappings(model)


def test_autoround_tunes_with_hooks_on() -> None:
    path = Path(llmcompressor.__file__).parent / "modifiers" / "autoround" / "base.py"
    (tune,) = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "apply_autoround"
    )
    assert [argument.arg for argument in tune.args.args] == ["self", "state", "modules"]
    assert "disable_hooks" not in path.read_text(), "`tune_with_hooks_off` is no longer needed"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pinning works here")
def test_pinning_fails_without_an_accelerator() -> None:
    pin_memory = upstream_own(IntermediatesCache.pin_memory)
    assert arguments(pin_memory) == ["self", "batch_index", "input_names"]
    cache = IntermediatesCache(None, None)
    cache.append({"x": torch.ones(2)})
    with pytest.raises(RuntimeError, match="accelerator"):
        pin_memory(cache, 0)


def test_awq_rounds_all_layers_by_the_scheme_of_the_last() -> None:
    search = inspect.getsource(AWQModifier._compute_best_scale)
    assert search.count("w_qscheme = ") == 1 and "forward_quantize(" in search.partition("# Q(W * s)")[2], (
        "`each_in_its_own_scheme` is not needed any more"
    )
    layer = nn.Linear(64, 8, bias=False)
    layer.quantization_scheme = preset_name_to_scheme("W8A16", ["Linear"])
    layer.quantization_scheme.weights.group_size = 32
    initialize_module_for_quantization(layer)
    layer.weight_scale.data.fill_(0.01)
    layer.weight_zero_point.data.zero_()
    another = QuantizationArgs(num_bits=2, strategy="group", group_size=32)
    with each_in_its_own_scheme():
        rounded = awq_base.forward_quantize(layer, layer.weight, "weight", another)
        assert len(rounded.unique()) > 4
    assert len(awq_base.forward_quantize(layer, layer.weight, "weight", another).unique()) <= 4
    assert awq_base.forward_quantize is forward_quantize


def test_gptq_clears_what_saw_no_token() -> None:
    gptq, module = GPTQModifier(targets="Linear", scheme="W4A16"), nn.Linear(16, 8, bias=False)
    gptq._hessians[module], gptq._num_samples[module] = 2 * torch.eye(16), torch.ones(())
    assert {m: float(trace) for m, trace in calibration.gptq_traces(gptq).items()} == {module: 32.0}
    calibration.forget_gptq(gptq, [module])
    assert not gptq._hessians and not gptq._num_samples
    weight = module.weight.detach()[None]
    scale = weight.abs().amax(-1, keepdim=True) / 7
    scheme = QuantizationArgs(num_bits=4, type="int", strategy="channel", symmetric=True)
    rounded = quantize_weight(
        weight.clone(), torch.zeros(1, 16, 16), scale, torch.zeros_like(scale), None, scheme
    )[0]
    assert not rounded.any(), "GPTQ keeps weights without inputs: `forget_gptq` is no longer needed"


@pytest.mark.parametrize(
    ("cls", "statistic"),
    [(SparseGPTModifier, "_hessians"), (WandaPruningModifier, "_row_scalars")],
)
def test_what_pruning_has_seen(cls: type, statistic: str) -> None:
    pruning, seen, unseen = cls(sparsity=0.5), nn.Linear(4, 4), nn.Linear(4, 4)
    pruning._module_names = {seen: "a", unseen: "b"}
    for module, value in ((seen, torch.ones(4)), (unseen, torch.zeros(4))):
        getattr(pruning, statistic)[module] = value
        pruning._num_samples[module] = 1
    assert calibration.pruning_watches(pruning, seen) and not calibration.pruning_watches(pruning, nn.ReLU())
    assert calibration.pruning_calibrated(pruning) == [seen, unseen]
    assert calibration.pruning_saw_inputs(pruning, seen)
    assert not calibration.pruning_saw_inputs(pruning, unseen)
    calibration.set_pruning_ratio(pruning, seen, 0.25)
    assert pruning._module_sparsities[seen] == 0.25
    calibration.forget_pruning(pruning, unseen)
    assert list(getattr(pruning, statistic)) == list(pruning._num_samples) == [seen]
    # What the modifier itself reads when it prunes.
    source = inspect.getsource(cls)
    assert all(f"self.{name}[" in source for name in (statistic, "_module_names", "_module_sparsities"))


def test_pruning_clears_what_saw_no_token() -> None:
    module = nn.Linear(16, 8, bias=False)
    sparse = sgpt_sparsify.sparsify_weight(
        module, {module: torch.zeros(16, 16)}, 0.5, 0, 0, block_size=128, dampening_frac=0.01,
        preserve_sparsity_mask=False,
    )[1]  # fmt: skip
    assert not sparse.any(), "SparseGPT keeps weights without inputs"
    zeros = wanda_sparsify.sparsify_weight(module, {module: torch.zeros(16)}, 0.5, 0, 0) == 0
    assert zeros[:, :8].all() and not zeros[:, 8:].any(), "Wanda looks at weights without inputs"


# llm-compressor: recipes and sessions


def test_the_factorys_books() -> None:
    load_modifiers()
    assert ModifierFactory._loaded
    assert {"GPTQModifier", "ExpertDropModifier"} <= set(known_modifiers())


def test_events_do_not_know_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def note(self: MagnitudePruningModifier, state: Any, event: Event, **_: Any) -> None:
        steps.append(event.global_step)

    modifier = MagnitudePruningModifier(
        targets="Linear", init_sparsity=0.0, final_sparsity=0.5, update_scheduler="linear", start=0, end=9
    )
    monkeypatch.setattr(MagnitudePruningModifier, "update_event", note)
    for lifecycle in (CompressionLifecycle(), training_session(None).lifecycle):
        lifecycle.recipe.modifiers = [modifier]
        lifecycle.initialized_ = True
        lifecycle.event(EventType.BATCH_START, global_step=7)
    assert steps == [0, 7] or steps == [None, 7], "llm-compressor's events know the step now"
    assert llmcompressor.core.lifecycle.Event is Event


def test_a_session_can_be_made_the_active_one() -> None:
    session = training_session(5)
    assert session.lifecycle is session._lifecycle and session.lifecycle.steps_per_epoch == 5
    before = active_session()
    with active(session):
        assert active_session() is session is session_functions._local_storage.session
    assert active_session() is before
    assert not arguments(session_functions.create_session), (
        "`create_session` takes a session: `active` can go"
    )
    assert arguments(CompressionSession) == [], "a session takes a lifecycle"


def test_shared_masks_are_removed_by_everyone() -> None:
    for cls in (ConstantPruningModifier, MagnitudePruningModifier):
        assert issubclass(cls, LayerParamMasking) and "parameterized_layers_" in cls.model_fields
        source = inspect.getsource(cls.on_finalize)
        assert "self.parameterized_layers_" in source and "remove_mask" in source
    assert "del self._masked_layer_params" in inspect.getsource(LayerParamMasking.remove_mask)


# llm-compressor: models


def test_the_lm_head_is_taken_out() -> None:
    model = tiny_models.build("mixtral", num_layers=1)
    batch = {"input_ids": torch.tensor([[3, 4, 5]])}
    with torch.no_grad():
        expected = model(**batch).logits
        with lm_head_in_place(model):
            torch.testing.assert_close(model(**batch).logits, expected)
        with disable_lm_head(model):
            assert disable_lm_head.__name__ in model.get_output_embeddings().forward.__qualname__
            assert model(**batch).logits.device.type == "meta"
            with lm_head_in_place(model):
                torch.testing.assert_close(model(**batch).logits, expected)
            assert model(**batch).logits.device.type == "meta"


def test_saving_is_wrapped_unless_marked() -> None:
    model = tiny_models.build("mixtral", num_layers=1)

    def save_pretrained(directory: str) -> None:
        raise NotImplementedError

    mark_wrapped(save_pretrained)
    model.save_pretrained = save_pretrained
    modify_save_pretrained(model)
    assert model.save_pretrained is save_pretrained
    del model.save_pretrained
    modify_save_pretrained(model)
    assert model.save_pretrained._overridden


# Opened checkpoints


def test_oneshot_refuses_stored_precisions_by_the_files_alone(tmp_path: Path) -> None:
    model = tiny_models.build("mixtral", num_layers=2)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="already quantized in a different format"):
        upstream_own(Oneshot.validate_model)(SimpleNamespace(model_args=ModelArguments(model=model)), model)


def test_caches_are_chosen_by_device_alone() -> None:
    assert arguments(OffloadCache.cls_from_device) == ["device"]
    with caches_of(DiskCache):
        assert OffloadCache.cls_from_device("cpu") is DiskCache
    assert OffloadCache.cls_from_device("cpu") is CPUCache


def test_a_module_is_initialized_alone() -> None:
    assert arguments(PreTrainedModel._init_weights) == ["self", "module"]
    model = tiny_models.build("mixtral", num_layers=1)
    rotary = model.model.rotary_emb
    expected = rotary.inv_freq.clone()
    rotary.inv_freq.zero_()
    initialize(model.model, rotary)
    assert torch.equal(rotary.inv_freq, expected)


def test_upstream_draws_a_bar_for_each_part_of_a_model() -> None:
    module = importlib.import_module("llmcompressor.pipelines.sequential.pipeline")
    assert module.tqdm is tqdm.tqdm
    assert "LifecycleCallbacks.sequential_epoch_end(subgraph.submodules(model))" in inspect.getsource(module)
