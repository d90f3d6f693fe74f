"""The architectures and the ways of trimming that vLLM is held to, as checkpoints with references."""

import functools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import build
from transformers import PreTrainedModel

from serving.checkpoints import drop_blocks, drop_experts, drop_moes, moe_name, save
from serving.engine import transformers_logprobs

# What checkpoints of an architecture say in config.json and the transformers config class does not.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "glm4_moe": {"head_dim": 32},
    "granitemoe": {},
    "gpt_oss": {},
    # vLLM's KV blocks, 32 tokens at least on a CPU, must divide a chunk.
    "llama4_text": {"attention_chunk_size": 32},
    "deepseek": {},
    "deepseek_v2": {},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}

# Blocks to drop where one alone would break what vLLM expects of the rest (test_engine_limits.py).
BLOCKS = {"gpt_oss": [1, 2]}

# Longer than the sliding windows and attention chunks of the tiny models, which are 32 tokens.
PROMPTS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(5)).tolist()


def _all_moes(model: PreTrainedModel) -> list[int]:
    return [i for i, layer in enumerate(model.model.layers) if moe_name(layer)]


# Expert lists keep as many of 0..3 as of 4..7, the two groups of group-limited routers.
VARIANTS: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "untouched": lambda model: {},
    "block drop": lambda model: drop_blocks(model, BLOCKS.get(model.config.model_type, [2])),
    "layer drop": lambda model: drop_moes(model, [1, 3]),
    "uniform expert drop": lambda model: drop_experts(
        model, {i: [0, 2, 3, 4, 6, 7] for i in _all_moes(model)}
    ),
    "non-uniform expert drop": lambda model: drop_experts(model, {2: [0, 1, 2, 5, 6, 7], 3: [1, 2, 4, 7]}),
    "layer and expert drop": lambda model: _merged(
        drop_moes(model, [3]), drop_experts(model, {1: [0, 1, 2, 5, 6, 7], 2: [1, 2, 4, 7]})
    ),
}

# Variants whose layers differ: the checkpoints that only the plugin can serve.
HETEROGENEOUS = ["layer drop", "non-uniform expert drop", "layer and expert drop"]


def _merged(*changes: dict[str, Any]) -> dict[str, Any]:
    return {"per_layer_config": {i: c for change in changes for i, c in change["per_layer_config"].items()}}


@dataclass(frozen=True)
class Case:
    """A checkpoint and what it should score."""

    checkpoint: pathlib.Path
    reference: list[list[float]]


def make_case(architecture: str, variant: str, folder: pathlib.Path) -> Case:
    """Write one trimmed tiny checkpoint under `folder`."""
    model = build(architecture, **ARCHITECTURES[architecture])
    changes = VARIANTS[variant](model)
    path = save(model, changes, folder / f"{architecture} {variant}".replace(" ", "-"))
    return Case(path, transformers_logprobs(model, PROMPTS))


@functools.cache
def untouched_reference(architecture: str) -> list[list[float]]:
    """What the untouched model scores."""
    return transformers_logprobs(build(architecture, **ARCHITECTURES[architecture]), PROMPTS)
