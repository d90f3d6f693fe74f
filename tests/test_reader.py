"""Checkpoints cut by hand load in `load_trimmed_moe` and compute what the uncut model computes with those
parts off.

The cutting here shares nothing with the package: it works on the tensors and the JSON that stock
`save_pretrained` wrote.
"""

import json
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

from llmcompressor_moe.checkpoint.reader import load_trimmed_moe

IDS = torch.arange(3, 27).reshape(2, 12)
EXPERTS = 8
# One expert of each half, so that two groups keep the same number.
REMOVED = {1: [2, 5], 2: [1, 6]}


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


class Cut:
    """A tiny model, and its checkpoint with one MoE layer dropped and two experts fewer in another."""

    def __init__(self, model_type: str, tmp: pathlib.Path):
        self.model = tiny_models.build(model_type)
        self.model_type = model_type
        layers = moe_layers(self.model, model_type)
        inline = {index for index, path in layers.items() if path.endswith(f".{index}")}
        *_, fewer, dropped = sorted(layers) if len(layers) > 1 else (None, *layers)
        self.dropped = None if inline else dropped
        self.fewer, self.paths = fewer, layers
        self.removed = REMOVED[2]
        self.path = tmp / "cut"
        self.model.save_pretrained(tmp)
        config = json.loads((tmp / "config.json").read_text())
        tensors = load_file(tmp / "model.safetensors")
        gone = keys_of(self.model, [layers[dropped]], tmp) if self.dropped is not None else set()
        sliced = keys_of(self.model, [layers[fewer]], tmp)
        kept = {name: tensor for name, tensor in tensors.items() if name not in gone | sliced}
        kept |= dict(filter(None, (without_experts(name, tensors[name], self.removed) for name in sliced)))
        attributes = count_attributes(model_type)
        text = config.get("text_config", config)
        per_layer = text.setdefault("per_layer_config", {})
        per_layer.setdefault(str(fewer), {}).update(dict.fromkeys(attributes, EXPERTS - len(self.removed)))
        if self.dropped is not None:
            per_layer[str(dropped)] = {"skip": ["mlp"]} | dict.fromkeys(attributes, 0)
        self.path.mkdir()
        (self.path / "config.json").write_text(json.dumps(config))
        save_file(kept, self.path / "model.safetensors", metadata={"format": "pt"})

    def expected(self, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
        """Logits of the uncut model with the same parts off."""
        with unroutable(self.model.get_submodule(self.paths[self.fewer]), self.removed, monkeypatch):
            if self.dropped is None:
                return logits(self.model)
            with zeroed(self.model.get_submodule(self.paths[self.dropped])):
                return logits(self.model)

    def load(self, path: pathlib.Path | None = None) -> tuple[PreTrainedModel, dict]:
        config = AutoConfig.from_pretrained(path or self.path)
        return auto_class(config).from_pretrained(
            path or self.path, attn_implementation="eager", output_loading_info=True
        )


@pytest.fixture(scope="module", params=tiny_models.buildable())
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    return Cut(request.param, tmp_path_factory.mktemp(request.param))


def test_cut_checkpoint_computes_what_the_uncut_model_does_without_those_parts(
    cut: Cut, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    expected = cut.expected(monkeypatch)
    assert (expected - logits(cut.model)).abs().max() > 0.05
    with load_trimmed_moe():
        model, info = cut.load()
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)

    model.save_pretrained(tmp_path)
    assert "allow_global_per_layer_attribute_access" not in (tmp_path / "config.json").read_text()
    with load_trimmed_moe():
        again, info = cut.load(tmp_path)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(again), logits(model), atol=0, rtol=0)


def test_stock_transformers_refuses_a_cut_checkpoint(cut: Cut) -> None:
    with pytest.raises(Exception, match=r"per-layer attribute|per_layer|size mismatch|mismatched"):
        cut.load()
