"""Trims tiny models by hand, without this project's code: a checkpoint, and a reference to compare with.

The reference is the untouched transformers model made to compute what the trimmed one should: a dropped
block passes its input on, a dropped MoE returns zeros, removed experts are cut out of router and weights.
The checkpoint is that model's tensors with a config edited as JSON.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


class Nothing(nn.Module):
    """A dropped MoE: zeros, and the second output that some decoder layers expect."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return zeros if self.outputs == 1 else (zeros,) * self.outputs


class PassThrough(nn.Module):
    """A dropped block: its input is its output."""

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states


def moe_name(layer: nn.Module) -> str | None:
    """The name of the layer's part that holds experts."""
    return next((name for name, part in layer.named_children() if hasattr(part, "experts")), None)


def drop_blocks(model: PreTrainedModel, blocks: Sequence[int]) -> dict[str, Any]:
    """Make the blocks pass-through; returns the changes of config.json."""
    config = model.config.to_dict()
    kept = [i for i in range(config["num_hidden_layers"]) if i not in blocks]
    for index in blocks:
        layer = PassThrough()
        layer.attention_type = getattr(model.model.layers[index], "attention_type", None)
        model.model.layers[index] = layer
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name in ("layer_types", "no_rope_layers"):
        if config.get(name):
            changes[name] = [config[name][i] for i in kept]
    for name in ("moe_layers", "mlp_only_layers"):
        if config.get(name):
            changes[name] = [kept.index(i) for i in config[name] if i in kept]
    return changes


def drop_moes(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, Any]:
    """Make the MoEs of the layers return nothing; returns the changes of config.json."""
    for index in layers:
        layer = model.model.layers[index]
        setattr(layer, moe_name(layer), Nothing(_outputs(model, layer.get_submodule(moe_name(layer)))))
    count = count_name(model)
    return {"per_layer_config": {str(i): {"skip": ["mlp"], count: 0} for i in layers}}


def _outputs(model: PreTrainedModel, part: nn.Module) -> int:
    """How many values `part` returns."""
    seen: list[Any] = []
    hook = part.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(torch.tensor([[1, 2]]))
    hook.remove()
    return len(seen[0]) if isinstance(seen[0], tuple) else 1


def drop_experts(model: PreTrainedModel, kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Cut each layer's MoE down to its `kept` experts, in that order; returns the changes of config.json."""
    count = count_name(model)
    total = getattr(model.config, count)
    for index, experts in kept.items():
        layer = model.model.layers[index]
        for part in layer.get_submodule(moe_name(layer)).modules():
            if getattr(part, "num_experts", None) != total:
                continue
            part.num_experts = len(experts)
            for _, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                if tensor.shape[0] == total:
                    tensor.data = tensor.data[list(experts)].clone()
    sizes = {index: len(experts) for index, experts in kept.items()}
    moe_layers = [i for i, layer in enumerate(model.model.layers) if moe_name(layer)]
    if set(sizes) == set(moe_layers) and len(set(sizes.values())) == 1:
        return {count: next(iter(sizes.values()))}
    return {"per_layer_config": {str(i): {count: n} for i, n in sizes.items()}}


def count_name(model: PreTrainedModel) -> str:
    """The canonical name of the config attribute that counts the experts."""
    stored = model.config.to_dict()
    return next(name for name in EXPERT_COUNTS if name in stored)


def save(model: PreTrainedModel, changes: Mapping[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Write `model` under its family's own tensor names, dropped blocks closed up; returns `folder`."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | dict(changes)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = folder / "model.safetensors"
    dropped = [i for i, layer in enumerate(model.model.layers) if isinstance(layer, PassThrough)]
    if dropped:
        tensors = load_file(weights)
        save_file({_closed_up(n, dropped): t for n, t in tensors.items()}, weights, metadata={"format": "pt"})
    return folder


def _closed_up(name: str, dropped: Sequence[int]) -> str:
    prefix, found, rest = name.partition("layers.")
    if not found:
        return name
    index, _, tail = rest.partition(".")
    return f"{prefix}layers.{int(index) - sum(d < int(index) for d in dropped)}.{tail}"
