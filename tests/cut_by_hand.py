"""Cut saved checkpoints by hand, and switch the same parts off in a model in memory.

Nothing of the package is used: the cutting works on the tensors and the JSON that stock `save_pretrained`
wrote.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

IDS = torch.arange(3, 27).reshape(2, 12)
EXPERTS = 8
# One expert of each half, so that two groups keep the same number.
REMOVED = [1, 6]


def auto_class(config) -> type:
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def experts_paths(model: PreTrainedModel, model_type: str) -> list[str]:
    family = next(f for f in tiny_models.families() if f.model_type == model_type)
    classes = tiny_models.experts_classes(family)
    return [name for name, module in model.named_modules() if isinstance(module, classes)]


def moe_layers(model: PreTrainedModel, model_type: str) -> dict[int, str]:
    """Layer index -> path of its MoE: the child of the block above the experts, or the block itself."""
    found = {}
    for path in experts_paths(model, model_type):
        parts = path.split(".")
        at = next(i for i, part in enumerate(parts) if part.isdigit())
        found[int(parts[at])] = ".".join(parts[: at + 2] if len(parts) > at + 2 else parts[: at + 1])
    return found


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def keys_of(model: PreTrainedModel, modules: list[str], tmp: pathlib.Path) -> set[str]:
    """Names in the checkpoint of everything under some modules: what changes on disk when they change."""
    before = load_file(tmp / "model.safetensors")
    tensors = [t for name in modules for t in model.get_submodule(name).state_dict().values()]
    values = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.add_(1)
    model.save_pretrained(tmp / "changed")
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
    after = load_file(tmp / "changed" / "model.safetensors")
    return {name for name in before if not torch.equal(before[name], after[name])}


def count_attributes(model_type: str) -> list[str]:
    """The config's fields that follow the number of experts."""
    texts = [tiny_models.tiny_config(model_type, num_experts=n).get_text_config().to_dict() for n in (8, 16)]
    return [name for name in texts[0] if texts[0][name] != texts[1][name]]


def without_experts(name: str, tensor: torch.Tensor, removed: list[int]) -> tuple[str, torch.Tensor] | None:
    """One tensor of an MoE layer without some of its routed experts; None where it belonged to one."""
    numbered = re.match(r"(.*\bexperts\.)(\d+)(\..*)", name)
    if numbered:
        before, number, after = numbered[1], int(numbered[2]), numbered[3]
        # families with a second set of experts for images number those on
        gone = sorted(removed + [index + EXPERTS for index in removed])
        if number in gone:
            return None
        return f"{before}{number - sum(index < number for index in gone)}{after}", tensor
    if "shared" in name:
        return name, tensor
    for dim in (0, 1):
        # routers may have rows for shared or null experts behind the routed ones
        if dim < tensor.ndim and EXPERTS <= tensor.shape[dim] <= EXPERTS + 1:
            kept = [index for index in range(tensor.shape[dim]) if index not in removed]
            return name, tensor.index_select(dim, torch.tensor(kept)).contiguous()
    return name, tensor


@contextmanager
def zeroed(module: nn.Module) -> Iterator[None]:
    """An MoE layer adds nothing."""

    def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if not isinstance(output, tuple):
            return torch.zeros_like(output)
        # ZAYA hands its routers' state from layer to layer
        state = args[1] if type(module).__module__.endswith("zaya") and len(args) > 1 else output[1]
        return torch.zeros_like(output[0]), state

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def unroutable(moe: nn.Module, removed: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No token of an MoE layer can be routed to some of its experts."""
    rows = {
        parameter.data_ptr()
        for name, parameter in moe.named_parameters()
        if parameter.ndim == 2 and EXPERTS <= parameter.shape[0] <= EXPERTS + 1 and "shared" not in name
    }
    assert rows
    linear = torch.nn.functional.linear

    def masked(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        scores = linear(hidden, weight, bias)
        if weight.data_ptr() in rows:
            scores[..., removed] = -torch.inf
        return scores

    state = {
        name: tensor
        for name, tensor in moe.state_dict().items()
        if "bias" in name and tensor.shape[-1] in (EXPERTS, EXPERTS + 1)
    }
    saved = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in state.values():
        tensor[..., removed] = -1e9
    monkeypatch.setattr(torch.nn.functional, "linear", masked)
    try:
        yield
    finally:
        monkeypatch.setattr(torch.nn.functional, "linear", linear)
        for name, tensor in state.items():
            tensor.copy_(saved[name])


def load(path: pathlib.Path) -> tuple[PreTrainedModel, dict]:
    """Model and loading information, by the Auto class that fits."""
    auto = auto_class(AutoConfig.from_pretrained(path))
    return auto.from_pretrained(path, attn_implementation="eager", output_loading_info=True)


class Cut:
    """A tiny model whose last MoE layer is to be dropped, and the one before it to lose two experts.

    :ivar dropped: index of the layer to drop; None where the family has no MoE layer of its own in the block
    """

    def __init__(self, model_type: str, tmp: pathlib.Path):
        self.model_type = model_type
        self.model = tiny_models.build(model_type)
        self.layers = moe_layers(self.model, model_type)
        self.fewer, last = sorted(self.layers)[-2:]
        self.dropped = None if self.layers[last].endswith(f".{last}") else last
        self.whole = tmp / "whole"
        self.model.save_pretrained(self.whole)

    @functools.cached_property
    def _gone(self) -> set[str]:
        dropped = self.layers.get(self.dropped)
        return keys_of(self.model, [dropped], self.whole) if dropped else set()

    @functools.cached_property
    def _sliced(self) -> set[str]:
        return keys_of(self.model, [self.layers[self.fewer]], self.whole)

    def write(self, source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        """Cut a checkpoint of this model (plain or compressed) into another directory."""
        gone, sliced = (_beside(keys) for keys in (self._gone, self._sliced))
        kept = {}
        for name, tensor in load_file(source / "model.safetensors").items():
            if name in self._sliced or name.startswith(sliced):
                kept |= dict(filter(None, [without_experts(name, tensor, REMOVED)]))
            elif name not in self._gone and not name.startswith(gone):
                kept[name] = tensor
        config = json.loads((source / "config.json").read_text())
        attributes = count_attributes(self.model_type)
        per_layer = config.get("text_config", config).setdefault("per_layer_config", {})
        per_layer.setdefault(str(self.fewer), {}).update(dict.fromkeys(attributes, EXPERTS - len(REMOVED)))
        if self.dropped is not None:
            per_layer[str(self.dropped)] = {"skip": ["mlp"]} | dict.fromkeys(attributes, 0)
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
        return target

    @contextmanager
    def off(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Switch the same parts off in an uncut model."""
        with unroutable(model.get_submodule(self.layers[self.fewer]), REMOVED, monkeypatch):
            if self.dropped is None:
                yield
                return
            with zeroed(model.get_submodule(self.layers[self.dropped])):
                yield


def _beside(keys: set[str]) -> tuple[str, ...]:
    """What all names of an MoE layer's tensors start with, so that compressed ones are found too."""
    start = os.path.commonpath([name.replace(".", "/") for name in keys] or [""]).replace("/", ".")
    return (f"{start}.",) if start and not start.rpartition(".")[2].isdigit() else ()
