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
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 128
HIDDEN = 64

# MoE families that transformers has not moved to the experts interface: modeling package -> experts classes.
WITHOUT_INTERFACE = {"llama4": ("Llama4TextExperts",)}

# What the rule cannot know, as constructor arguments of the config: model_type -> field -> value,
# or a function of the values that the rule chose.
EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "llama4_text": {
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16,
        "moe_layers": lambda v: list(range(v["num_hidden_layers"])),
        "no_rope_layers": lambda v: [int((i + 1) % 4 != 0) for i in range(v["num_hidden_layers"])],
    },
}

# Families that cannot be built as a tiny causal language model: model_type -> reason.
UNBUILDABLE: dict[str, str] = {}


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
    """The model type of the family's causal LM: its text config's where it has one."""
    return f"{package}_text" if f"{package}_text" in CONFIG_MAPPING else package


@functools.cache
def families() -> list[Family]:
    """Every family of the installed transformers that uses the experts interface, sorted by name."""
    root = pathlib.Path(transformers.__file__).parent / "models"
    found = []
    for path in sorted(root.glob("*/modeling_*.py")):
        package = path.parent.name
        experts = _experts_classes(path) or WITHOUT_INTERFACE.get(package, ())
        if experts:
            module = f"transformers.models.{package}.{path.stem}"
            found.append(Family(_model_type(package), module, experts))
    return found


def unbuildable() -> dict[str, str]:
    """Families that cannot be built as a tiny causal language model, with the reason."""
    return dict(UNBUILDABLE)


def buildable() -> list[str]:
    """Model types that `build` accepts."""
    return [family.model_type for family in families() if family.model_type not in UNBUILDABLE]


def _tiny_values(default: PretrainedConfig, num_layers: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """Constructor arguments that make a text config tiny, for the fields that `default` has.

    head_dim 32, and for multi-head latent attention kv_lora_rank 512 with 64 rotary dimensions, because
    vLLM has no smaller kernels.
    """
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "sliding_window": 32,
        # feed-forward
        "intermediate_size": HIDDEN,
        "intermediate_size_mlp": HIDDEN,
        "moe_intermediate_size": HIDDEN,
        "shared_expert_intermediate_size": HIDDEN,
        "first_k_dense_replace": 1,
        # experts
        "num_local_experts": num_experts,
        "num_experts": num_experts,
        "n_routed_experts": num_experts,
        "num_experts_per_tok": top_k,
        "n_group": 2,
        "topk_group": 1,
        # latent attention
        "q_lora_rank": 32,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    }
    stored = default.to_dict()
    chosen = {name: value for name, value in values.items() if name in stored}
    if default.__dict__.get("kv_lora_rank") is not None:
        # latent attention has no grouped keys and its head_dim is the rotary part
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
        chosen["head_dim"] = chosen["qk_rope_head_dim"]
    return chosen


def tiny_config(
    model_type: str, num_layers: int = 4, num_experts: int = 8, top_k: int | None = None, **overrides: Any
) -> PretrainedConfig:
    """The tiny text config of a family; `overrides` are constructor arguments and win over everything.

    top_k None means 2, or 1 where the family knows no other.
    """
    config_class = CONFIG_MAPPING[model_type]
    values = _tiny_values(config_class(), num_layers, num_experts, top_k or 2)
    for name, value in EXTRA.get(model_type, {}).items():
        if name != "num_experts_per_tok" or top_k is None:
            values[name] = value(values) if callable(value) else value
    return config_class(**values | overrides)


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter and floating-point buffer that is saved so that each of them changes the output.

    Matrices are normal with a standard deviation of 1.5 / sqrt(fan in) (0.19 at 64), norms are near one,
    biases (a router's score correction among them) have a standard deviation of 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim >= 2:
            tensor.copy_(noise * 1.5 / min(tensor.shape[-1], tensor.shape[-2]) ** 0.5)
        elif name.endswith("weight"):
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
    auto = (
        AutoModelForCausalLM
        if type(config) in AutoModelForCausalLM._model_mapping
        else AutoModelForImageTextToText
    )
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    _randomize(model, seed)
    return model


def experts_classes(family: Family) -> tuple[type[torch.nn.Module], ...]:
    """The classes behind `family.experts`."""
    module = importlib.import_module(family.modeling)
    return tuple(getattr(module, name) for name in family.experts)
