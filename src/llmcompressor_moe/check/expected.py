"""Which tensors a config demands: the model is built on the meta device and its state dict is turned into the
checkpoint's own names and shapes by the same reversal that `save_pretrained` uses.
"""

import contextlib
import re
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from llmcompressor_moe.check.config import ReadConfig
from llmcompressor_moe.check.naming import Naming, find_naming, saved_state
from llmcompressor_moe.compat.transformers.building import build, class_for, class_named
from llmcompressor_moe.topology import (
    MoELayer,
    NotAnMoEError,
    Topology,
    expert_width_attributes,
    find_topology,
)

# Names under which llm-compressor linearizes experts, whatever the family calls them.
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


@dataclass(frozen=True)
class LinearSite:
    """A module that a quantization config can address, by its native name.

    `kind` is `linear`, `router`, `gate` (a single row that scales a shared expert), `expert` or `embedding`;
    `runtime` the module's name inside the transformers model and `classes` the names of its classes there;
    sizes as in nn.Linear.
    """

    name: str
    runtime: str
    kind: str
    in_features: int
    out_features: int
    bias: bool
    layer: int | None = None
    classes: tuple[str, ...] = ("Linear",)


@dataclass(frozen=True)
class Linearized:
    """An expert projection under the name that llm-compressor gives it.

    `native` is the family's own module name, None where the family stores its experts fused; `shape` is
    (out, in).
    """

    native: str | None
    shape: tuple[int, ...]
    layer: int
    bias: bool = False


@dataclass
class ExpectedModel:
    """What a config demands of the files.

    `shapes`: native tensor name -> shape. `integers`: those that hold no floats. `optional`: tensors that may
    be there (tied weights). `layers_path`: native module path of the stack of blocks. `experts_path`: native
    module path of each MoE layer's experts. `linearized`: names that llm-compressor gives experts, where
    they are not the native ones. `aliases`: native expert module -> its other names. `roles`: native expert
    module -> gate_proj, up_proj or down_proj.
    """

    model: PreTrainedModel
    topology: Topology | None
    shapes: dict[str, tuple[int, ...]]
    optional: dict[str, tuple[int, ...]]
    layers_path: str
    integers: set[str] = field(default_factory=set)
    sites: dict[str, LinearSite] = field(default_factory=dict)
    experts_path: dict[int, str] = field(default_factory=dict)
    fused_experts: dict[int, list[str]] = field(default_factory=dict)
    linearized: dict[str, Linearized] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    router_tensors: dict[int, list[str]] = field(default_factory=dict)
    ignore_unexpected: list[re.Pattern] = field(default_factory=list)

    @property
    def moe_layers(self) -> dict[int, MoELayer]:
        """Block index -> MoE layer that the config builds; dropped ones are not in it."""
        return self.topology.moe_layers if self.topology else {}


def model_class(config: ReadConfig) -> type[PreTrainedModel] | None:
    """The transformers class that `architectures` names, else the one that the config maps to."""
    names = config.raw.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        found = class_named(names[0])
        if found is not None:
            return found
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        found = class_for(auto, type(config.parsed))
        if found is not None:
            return found
    return None


def needs_trimmed_reader(config: ReadConfig) -> bool:
    """Whether `per_layer_config` skips parts, counts experts or says how wide they are, which no stock model class
    understands.
    """
    written = config.raw_text.get("per_layer_config")
    if not isinstance(written, dict):
        return False
    names = {name for layer in written.values() if isinstance(layer, dict) for name in layer}
    told = {"skip", config.expert_attribute, *expert_width_attributes(config.text)}
    return not names.isdisjoint(told)


def build_meta(config: ReadConfig, cls: type[PreTrainedModel]) -> PreTrainedModel:
    """The model on the meta device: names and shapes without memory. Raises what the model class raises."""
    with contextlib.ExitStack() as stack:
        if needs_trimmed_reader(config):
            from llmcompressor_moe.checkpoint.reader import load_trimmed_moe

            stack.enter_context(load_trimmed_moe())
        stack.enter_context(torch.device("meta"))
        model = build(cls, config.parsed)
    model.tie_weights()
    return model


def lay_out(config: ReadConfig, stored: Collection[str] = ()) -> ExpectedModel | None:
    """Everything the config demands; None when transformers has no model class for it.

    The names of the `stored` tensors decide between prefixes where the architecture has several.

    Raises:
        Exception: whatever the model class raises on a config that cannot be built.
    """
    cls = model_class(config)
    if cls is None:
        return None
    model = build_meta(config, cls)
    naming = find_naming(model, stored)
    state, tied = saved_state(model)
    native = naming.revert({k: v for k, v in state.items() if k not in tied})
    shapes = {name: tuple(tensor.shape) for name, tensor in native.items()}
    optional = {name: tuple(t.shape) for name, t in naming.revert({k: state[k] for k in tied}).items()}
    try:
        topology = find_topology(model)
    except NotAnMoEError:
        topology = None
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    expected = ExpectedModel(
        model=model,
        topology=topology,
        shapes=shapes,
        optional=optional,
        layers_path=naming.native_module(topology.stack) if topology else _stack(model, config.num_layers),
        integers={name for name, tensor in native.items() if not tensor.is_floating_point()},
        ignore_unexpected=[re.compile(p) for p in patterns],
    )
    _fill_modules(expected, naming)
    _fill_experts(expected, naming)
    return expected


def _stack(model: PreTrainedModel, num_layers: int) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name
    return "model.layers"


def layer_of(name: str, layers_path: str) -> int | None:
    """Index of the block that a native name belongs to, None outside the stack."""
    prefix = f"{layers_path}."
    if not name.startswith(prefix):
        return None
    head = name[len(prefix) :].split(".", 1)[0]
    return int(head) if head.isdigit() and len(head) <= 6 else None


def _fill_modules(expected: ExpectedModel, naming: Naming) -> None:
    """Linears, routers, gates and embeddings outside the experts."""
    routers = {moe.router: index for index, moe in expected.moe_layers.items() if moe.router}
    experts = tuple(f"{moe.experts}." for moe in expected.moe_layers.values())
    parents = {moe.module: index for index, moe in expected.moe_layers.items() if not moe.inline}
    for runtime, module in expected.model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or f"{runtime}.".startswith(experts):
            continue
        router = next((r for r in routers if runtime == r or runtime.startswith(f"{r}.")), None)
        if router is not None:
            kind = "router"
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
        elif isinstance(module, nn.Linear):
            kind = "gate" if weight.shape[0] == 1 and runtime.rpartition(".")[0] in parents else "linear"
        else:
            continue
        name = naming.native_module(runtime)
        if f"{name}.weight" in expected.shapes:
            expected.sites[name] = LinearSite(
                name,
                runtime,
                kind,
                weight.shape[1],
                weight.shape[0],
                getattr(module, "bias", None) is not None,
                layer_of(name, expected.layers_path),
                tuple(cls.__name__ for cls in type(module).__mro__),
            )
    for index, moe in expected.moe_layers.items():
        if moe.router:
            native = naming.native_module(moe.router)
            expected.router_tensors[index] = [
                t for t, shape in expected.shapes.items() if t.startswith(f"{native}.") and shape
            ]


def _fill_experts(expected: ExpectedModel, naming: Naming) -> None:
    """Names and roles of the routed experts' tensors, native and linearized."""
    by_runtime: dict[str, list[tuple[str, int | None]]] = {}
    for native in expected.shapes:
        runtime, position = naming.runtime_of(native)
        by_runtime.setdefault(runtime, []).append((native, position))
    for layer, moe in expected.moe_layers.items():
        experts = expected.model.get_submodule(moe.experts)
        home = naming.native_module(moe.experts)
        expected.experts_path[layer] = home
        for parameter, _ in experts.named_parameters():
            natives = by_runtime.get(f"{moe.experts}.{parameter}", [])
            per_expert = [n for n in natives if expert_index(n[0], home) is not None]
            if not per_expert:
                expected.fused_experts.setdefault(layer, []).extend(n for n, _ in natives)
            roles = {"gate_up_proj": (GATE, UP), "up_proj": (UP,), "down_proj": (DOWN,)}.get(parameter)
            if roles is None:
                continue
            if per_expert:
                for native, position in per_expert:
                    _add_expert(expected, layer, moe, native, home, roles[min(position or 0, len(roles) - 1)])
            else:
                _add_linearized(expected, layer, home, parameter, experts)


def expert_index(name: str, experts_path: str) -> int | None:
    """Index of the expert that a tensor under `experts_path` belongs to; None for fused tensors."""
    prefix = f"{experts_path}."
    if not name.startswith(prefix):
        return None
    head = name[len(prefix) :].split(".", 1)[0]
    return int(head) if head.isdigit() and len(head) <= 6 else None


def _add_expert(
    expected: ExpectedModel, layer: int, moe: MoELayer, native: str, home: str, role: str
) -> None:
    index = expert_index(native, home)
    if index is None or not native.endswith(".weight"):
        return
    name = native.removesuffix(".weight")
    shape = expected.shapes[native]
    expected.roles[name] = role
    expected.sites[name] = LinearSite(
        name,
        f"{moe.experts}.{index}.{role}",
        "expert",
        shape[-1],
        shape[0],
        f"{name}.bias" in expected.shapes,
        layer,
    )
    others = dict.fromkeys((f"{home}.{index}.{role}", f"{moe.experts}.{index}.{role}"))
    others.pop(name, None)
    expected.aliases[name] = tuple(others)
    for other in others:
        expected.linearized[other] = Linearized(name, shape, layer)


def _add_linearized(
    expected: ExpectedModel, layer: int, home: str, parameter: str, experts: nn.Module
) -> None:
    """Names that a quantized expert of a family with fused experts gets."""
    value = getattr(experts, parameter)
    if value.ndim != 3:
        return
    rows, columns = value.shape[1:]
    # Llama 4 follows no interface that would say it: its down projection ends in the hidden size
    transposed = getattr(experts, "is_transposed", None)
    if transposed is None:
        transposed = parameter == "gate_up_proj" and columns == 2 * experts.down_proj.shape[1]
        transposed |= parameter == "down_proj" and 2 * rows == experts.gate_up_proj.shape[2]
    if transposed:
        rows, columns = columns, rows
    if parameter == "gate_up_proj":
        rows //= 2
    bias = getattr(experts, f"{parameter}_bias", None) is not None
    for index in range(value.shape[0]):
        for role in (GATE, UP) if parameter == "gate_up_proj" else (parameter,):
            expected.linearized[f"{home}.{index}.{role}"] = Linearized(None, (rows, columns), layer, bias)
