"""The ways of trimming that vLLM is held to, as checkpoints with references."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import support
import torch
from tiny_models import build
from transformers import PreTrainedModel

from llmcompressor_moe import BlockDropModifier, ExpertDropModifier, ExpertWidthModifier, LayerDropModifier
from llmcompressor_moe.surgery.width import width_fields, width_of
from llmcompressor_moe.topology import find_topology
from serving.checkpoints import drop_blocks, drop_experts, drop_moes, moe_name, save
from serving.engine import transformers_logprobs
from serving.families import ARCHITECTURES

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


def _blocks_and_experts(model_type: str, layers: list[int]) -> list:
    blocks = BLOCKS.get(model_type, [2])
    removed = {layer: [1, 5] for layer in layers if layer not in blocks}
    return [BlockDropModifier(blocks=blocks), ExpertDropModifier(experts=removed), *_narrower(model_type)]


def _layers_and_experts(model_type: str, layers: list[int]) -> list:
    experts = {layers[0]: [3, 4], layers[1]: [0, 3, 5, 6]}
    narrower = _narrower(model_type, protect=layers[:1])
    return [LayerDropModifier(layers=[layers[2]]), ExpertDropModifier(experts=experts), *narrower]


def _narrower(model_type: str, protect: Sequence[int] = ()) -> list:
    """Half of the channels of every expert, where a config can say it."""
    model = build(model_type, **ARCHITECTURES[model_type])
    moe = next(iter(find_topology(model).moe_layers.values()))
    width = width_of(model, moe)
    try:
        shared = width_fields(model, moe, width, width // 2, alone=bool(protect)).shared
    except ValueError:
        return []
    return [
        ExpertWidthModifier(
            width=width // 2,
            criterion="weight_norm",
            refit=False,
            shared_experts=bool(shared),
            protect=list(protect),
        )
    ]


# The same by this project, in the words of a recipe: all kinds of drop, and narrower experts, in two checkpoints,
# a plain one and one that only the plugin can serve. Called with the model type and the blocks that have an MoE.
RECIPES: dict[str, Callable[[str, list[int]], list]] = {
    "blocks and experts": _blocks_and_experts,
    "layers and experts": _layers_and_experts,
}


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


def trimmed_case(architecture: str, recipe: str, folder: pathlib.Path) -> Case:
    """Have `oneshot` trim a tiny model under `folder`; the reference is what transformers makes of the result.

    tests/test_families.py holds transformers on trimmed checkpoints to untouched models with parts switched off.
    """
    path = oneshot(architecture, RECIPES[recipe], folder)
    return Case(path, transformers_logprobs(support.load(path), PROMPTS))


def oneshot(
    architecture: str, recipe: Callable[[str, list[int]], list], folder: pathlib.Path
) -> pathlib.Path:
    """Write what `oneshot` makes of a tiny model, without data, by a recipe as in `RECIPES`."""
    source = support.saved(architecture, folder / "untouched", **ARCHITECTURES[architecture])
    model, output = support.load(source), folder / "trimmed"
    layers = sorted(find_topology(model).moe_layers)
    support.trim(model, recipe(architecture, layers), output_dir=str(output), no_data=True)
    return output


@functools.cache
def untouched_reference(architecture: str) -> list[list[float]]:
    """What the untouched model scores."""
    return transformers_logprobs(build(architecture, **ARCHITECTURES[architecture]), PROMPTS)
