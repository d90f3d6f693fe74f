"""Builds every Mixture-of-Experts family of the installed transformers, tiny and with random weights.

The list of families is not written down: it is read from the sources of transformers, so a newer
release is walked too. A family is one `model_type` whose modeling file declares experts behind the
experts interface (`@use_experts_implementation`), plus the few in `WITHOUT_INTERFACE`.

Sizes come from one rule, `_tiny_values`: whatever a config class calls its sizes is set where the
field exists. What a family needs beyond that stands in `EXTRA`, the only table.
"""

import ast
import functools
import importlib
import pathlib
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import llmcompressor_moe.architectures  # noqa: F401  (the Auto classes find `BROUGHT` then)

VOCAB = 128
HIDDEN = 64

# MoE families that transformers has not moved to the experts interface: modeling package -> experts classes.
WITHOUT_INTERFACE = {"llama4": ("Llama4TextExperts",), "step3p7": ("Step3p7Experts",)}

# Families that the package brings because transformers has no class for them: model_type -> its module and the
# classes of its experts.
BROUGHT = {"deepseek": ("llmcompressor_moe.architectures.deepseek", ("Qwen2MoeExperts",))}

# What the rule cannot know: model_type of the text config -> field -> value, or a function of the
# number of layers.
EXTRA: dict[str, dict[str, Any]] = {
    "axk2": {"index_head_dim": 64},
    "deepseek_ocr2_text": {"topk_method": "group_limited_greedy"},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v4": {
        # one layer routed by a table of token ids, then ordinary routers
        "mlp_layer_types": lambda n: ["hash_moe"] + ["moe"] * (n - 1),
        "layer_types": lambda n: cycle(("heavily_compressed_attention", "compressed_sparse_attention"), n),
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_head_dim": 32,
        "hc_sinkhorn_iters": 4,
    },
    "ernie4_5_moe": {"moe_layer_end_index": lambda n: n - 1},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [HIDDEN, HIDDEN // 2],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 6, 4]},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "layer_types": lambda n: cycle(("sliding_attention", "full_attention"), n),
    },
    "glm4v_moe_text": {
        "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    },
    "glm5_next_text": {
        "qk_rope_head_dim": 0,
        "index_kpool": 2,
        "hc_sinkhorn_iters": 4,
        "layer_types": lambda n: cycle(("linear_attention", "deepseek_sparse_attention"), n),
    },
    "granitemoehybrid": {"layer_types": lambda n: cycle(("linear_attention", "full_attention"), n)},
    "inkling_text": {"logits_mup_width_multiplier": 1.0, "d_rel": 12, "rel_extent": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "mamba_dt_rank": 12},
    "kimi_linear": {"layer_types": lambda n: cycle(("linear_attention", "full_attention"), n)},
    "lfm2_moe": {"layer_types": lambda n: cycle(("conv", "full_attention"), n)},
    "llama4_text": {
        "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
        # transformers derives these two from fields that vLLM does not read
        "moe_layers": lambda n: list(range(n)),
        "no_rope_layers": lambda n: [int((i + 1) % 4 != 0) for i in range(n)],
    },
    "nemotron_h": {
        "layers_block_type": lambda n: cycle(("linear_attention", "moe", "full_attention", "moe"), n)
    },
    "qwen4_exp_text": {
        "layer_types": lambda n: cycle(("linear_attention", "qwen_sparse_attention"), n),
        "hc_count": 2,
        "hc_lowrank": 12,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p5": {
        "share_expert_dim": HIDDEN,
        "layer_types": lambda n: cycle(("full_attention", "sliding_attention"), n),
        # the last layer clamps its experts
        "swiglu_limits": lambda n: [None] * (n - 1) + [0.5],
        "swiglu_limits_shared": lambda n: [None] * (n - 1) + [0.5],
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}

# The same for the vision and audio parts: model_type of that part -> field -> value.
EXTRA_PARTS: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_sam_vision_model": {
        "global_attn_indexes": [0],
        "downsample_channels": [32, 32],
        "output_channels": 32,
        "scale": 32,
    },
    "inkling_audio": {"mel_vocab_size": 16, "n_mel_bins": 8},
    "inkling_vision": {"n_layers": 4, "patch_size": 8},
    "llama4_vision_model": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
}

# Text model that goes into wrappers for any text model: model_type of the wrapper -> of the text model.
WRAPPED = {"llava": "mixtral"}

# Experts that are not in a causal language model: modeling package -> reason.
UNBUILDABLE: dict[str, str] = {
    "diffusion_gemma": "denoises blocks of text with an encoder and a decoder; not a causal language model",
    "openai_privacy_filter": "classifies tokens with bidirectional attention; not a causal language model",
}


def cycle(pattern: tuple[str, ...], length: int) -> list[str]:
    """The pattern repeated to a length, as the lists of layer types want it."""
    return [pattern[i % len(pattern)] for i in range(length)]


@dataclass(frozen=True)
class Family:
    """One MoE family: its text model type, the module with its code, the class names of its experts."""

    model_type: str
    modeling: str
    experts: tuple[str, ...]


def _experts_classes(path: pathlib.Path) -> tuple[str, ...]:
    source = path.read_text()
    if "use_experts_implementation" not in source:
        return ()

    def named(decorator: ast.expr) -> bool:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        return isinstance(target, ast.Name) and target.id == "use_experts_implementation"

    return tuple(
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and any(named(d) for d in node.decorator_list)
    )


def _model_type(package: str) -> str:
    """The family's causal language model: a text-only one where the package has it.

    Packages without any keep their own name (`UNBUILDABLE` says why).
    """
    own = [name for name in CONFIG_MAPPING if model_type_to_module_name(name) == package]
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        candidates = [name for name in own if name in mapping and name not in UNBUILDABLE]
        text_only = [name for name in candidates if "text_config" not in CONFIG_MAPPING[name].sub_configs]
        if candidates:
            return (text_only or candidates)[0]
    return package


@functools.cache
def families() -> list[Family]:
    """Every family of the installed transformers that uses the experts interface, sorted by package, then those
    of `BROUGHT`."""
    root = pathlib.Path(transformers.__file__).parent / "models"
    found = []
    for path in sorted(root.glob("*/modeling_*.py")):
        package = path.parent.name
        experts = _experts_classes(path) or WITHOUT_INTERFACE.get(package, ())
        if experts:
            module = f"transformers.models.{package}.{path.stem}"
            found.append(Family(_model_type(package), module, experts))
    return found + [Family(model_type, *where) for model_type, where in BROUGHT.items()]


def unbuildable() -> dict[str, str]:
    """Families that cannot be built as a tiny causal language model, with the reason."""
    return dict(UNBUILDABLE)


def buildable() -> list[str]:
    """Model types that `build` accepts."""
    return [family.model_type for family in families() if family.model_type not in UNBUILDABLE]


def multimodal() -> list[str]:
    """Model types with a vision or audio tower beside an MoE text model; `build` accepts them."""
    packages = {family.modeling.split(".")[2] for family in families()}
    return [
        name
        for name, config_class in CONFIG_MAPPING.items()
        if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        and name not in UNBUILDABLE
        and "text_config" in config_class.sub_configs
        and (model_type_to_module_name(name) in packages or name in WRAPPED)
    ]


def _tiny_values(default: PretrainedConfig, num_layers: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """Constructor arguments that make a text config tiny, for the fields that `default` has.

    head_dim 32, and for multi-head latent attention kv_lora_rank 512 with 64 rotary dimensions, because
    vLLM has no smaller kernels. One dense layer first, and two groups of experts, where the family knows
    such a thing. Fields that list layers are left to the config class unless they say which are dense.
    """
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 32,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "eod_token_id": 3,
        "sep_token_id": 4,
        "tie_word_embeddings": False,
        "sliding_window": 32,
        "logit_scale": 1.0,
        # feed-forward
        "intermediate_size": HIDDEN,
        "intermediate_size_mlp": HIDDEN,
        "dense_intermediate_size": HIDDEN,
        "prefix_dense_intermediate_size": HIDDEN,
        "moe_intermediate_size": HIDDEN,
        "shared_intermediate_size": HIDDEN,
        "shared_expert_intermediate_size": HIDDEN,
        "moe_shared_expert_intermediate_size": HIDDEN,
        "first_k_dense_replace": 1,
        "num_dense_layers": 1,
        # experts
        "num_local_experts": num_experts,
        "num_experts": num_experts,
        "n_routed_experts": num_experts,
        "moe_num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "num_experts_per_token": top_k,
        "moe_k": top_k,
        "moe_topk": top_k,
        "top_k_experts": top_k,
        "n_shared_experts": 1,
        "num_shared_experts": 1,
        "moe_num_shared_experts": 1,
        "n_group": 2,
        "num_expert_group": 2,
        "topk_group": 1,
        # latent and sparse attention
        "q_lora_rank": 32,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "index_topk": 8,
        "index_head_dim": 64,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        # linear attention
        "linear_head_dim": 32,
        "linear_num_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_d_state": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "mamba_chunk_size": 16,
        "chunk_size": 16,
    }
    stored = default.to_dict()
    chosen = {name: value for name, value in values.items() if name in stored}
    if stored.get("kv_lora_rank") is not None:
        # no grouped keys, and head_dim (where it is not derived) is the rotary part
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
        chosen.pop("head_dim", None)
    if set(stored.get("mlp_layer_types") or ()) <= {"dense", "sparse"} and "mlp_layer_types" in stored:
        chosen["mlp_layer_types"] = ["dense"] + ["sparse"] * (num_layers - 1)
        chosen.pop("first_k_dense_replace", None)
    if "layers_block_type" in stored and "layers_block_type" not in default.attribute_map:
        # the length of that list is the number of layers
        chosen.pop("num_hidden_layers", None)
    return chosen


def _tiny_part(config: PretrainedConfig) -> dict[str, Any]:
    """Constructor arguments that make a vision or audio part tiny, nested parts included."""
    values = {
        "vocab_size": VOCAB,
        "depth": 1,
        "num_hidden_layers": 1,
        "encoder_layers": 1,
        "hidden_size": 32,
        "d_model": 32,
        "intermediate_size": 32,
        "mlp_dim": 32,
        "encoder_ffn_dim": 32,
        "projection_intermediate_size": 32,
        "downsample_hidden_size": 32,
        "num_heads": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "encoder_attention_heads": 2,
        "image_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "out_hidden_size": HIDDEN,
        "output_dim": HIDDEN,
        "max_position_embeddings": 256,
    }
    stored = config.to_dict()
    chosen = {name: value for name, value in values.items() if name in stored}
    for name in config.sub_configs:
        chosen[name] = _tiny_part(getattr(config, name))
    return chosen | EXTRA_PARTS.get(config.model_type, {})


def _text_values(
    config_class: type[PretrainedConfig],
    num_layers: int,
    num_experts: int,
    top_k: int | None,
    overrides: dict,
) -> dict[str, Any]:
    values = _tiny_values(config_class(), num_layers, num_experts, top_k or 2)
    for name, value in EXTRA.get(config_class.model_type, {}).items():
        if name != "num_experts_per_tok" or top_k is None:
            values[name] = value(num_layers) if callable(value) else value
    return values | overrides


def tiny_config(
    model_type: str, num_layers: int = 4, num_experts: int = 8, top_k: int | None = None, **overrides: Any
) -> PretrainedConfig:
    """The tiny config of a family; `overrides` are arguments of its text config and win over everything.

    top_k None means 2, or 1 where the family knows no other.
    """
    config_class = CONFIG_MAPPING[model_type]
    if "text_config" not in config_class.sub_configs:
        return config_class(**_text_values(config_class, num_layers, num_experts, top_k, overrides))
    default = config_class()
    values = {
        name: _tiny_part(getattr(default, name, None) or part_class())
        for name, part_class in config_class.sub_configs.items()
        if name != "text_config"
    }
    wrapped = WRAPPED.get(model_type)
    text_class = CONFIG_MAPPING[wrapped] if wrapped else type(default.get_text_config())
    values["text_config"] = _text_values(text_class, num_layers, num_experts, top_k, overrides)
    if wrapped:
        values["text_config"]["model_type"] = wrapped
    # the marker tokens of images and sounds, from the top of the vocabulary
    markers = [name for name, value in default.to_dict().items() if name.endswith("token_id") and value]
    values |= {name: VOCAB - 1 - i for i, name in enumerate(markers)}
    return config_class(**values, tie_word_embeddings=False)


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter and floating-point buffer that is saved so that each of them changes the output.

    Matrices are normal with a standard deviation of 1.5 / sqrt(fan in) (0.19 at 64), norms and scales are
    near one, biases (a router's score correction among them) have a standard deviation of 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point():
            if name.endswith("tid2eid"):  # a table of experts by token id
                experts = model.config.get_text_config().n_routed_experts
                tensor.copy_(torch.randint(experts, tensor.shape, generator=generator))
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim >= 2:
            tensor.copy_(noise * 1.5 / min(tensor.shape[-1], tensor.shape[-2]) ** 0.5)
        elif name.endswith(("weight", "scale", "scalar")):
            tensor.copy_(1 + 0.1 * noise)
        else:
            tensor.copy_(0.1 * noise)


def build(
    model_type: str,
    num_layers: int = 4,
    num_experts: int = 8,
    top_k: int | None = None,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny random model of a family in float32 and eval mode; the same seed gives the same weights.

    Raises ValueError for a family that `unbuildable()` names.
    """
    if model_type in UNBUILDABLE:
        raise ValueError(f"{model_type} cannot be built tiny: {UNBUILDABLE[model_type]}")
    config = tiny_config(model_type, num_layers, num_experts, top_k, **overrides)
    model = _auto(config).from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    _randomize(model, seed)
    return model


def on_meta(model_type: str) -> PreTrainedModel:
    """What `build` gives, on the meta device: names and shapes."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        return _auto(config).from_config(config)


def _auto(config: PretrainedConfig) -> type:
    text_only = (
        "text_config" not in config.sub_configs and type(config) in AutoModelForCausalLM._model_mapping
    )
    return AutoModelForCausalLM if text_only else AutoModelForImageTextToText


def experts_classes(family: Family) -> tuple[type[torch.nn.Module], ...]:
    """The classes behind `family.experts`."""
    module = importlib.import_module(family.modeling)
    return tuple(getattr(module, name) for name in family.experts)
