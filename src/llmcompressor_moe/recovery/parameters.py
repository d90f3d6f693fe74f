"""Which parameters of a student train: named sets, found by structure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.parts import ATTENTION, EXPERTS, ROUTER, SHARED, block_of, part_of
from llmcompressor_moe.recovery.adapters import adapter_parameters, inner_model, plain_name, student_topology
from llmcompressor_moe.recovery.fake_quantization import quantization_parameters
from llmcompressor_moe.topology import Block

__all__ = ["PARAMETER_SETS", "check_sets", "select", "set_of"]


def set_of(name: str, block: Block | None) -> str | None:
    """The set that a parameter is in besides ``all``; None for embeddings, head and dense feed-forward layers.

    :param name: as the model has it without adapters
    :param block: the block that it stands in
    """
    part = part_of(name, block)
    owner = name.rpartition(".")[0]
    if part == SHARED:
        # A single matrix is no expert, but what weighs a shared one.
        return "router" if owner in block.moe.shared_experts else "experts"
    if part in (ROUTER, EXPERTS):
        return {ROUTER: "router", EXPERTS: "experts"}[part]
    if "norm" in owner.rpartition(".")[2]:
        return "norms"
    return "attention" if part == ATTENTION else None


PARAMETER_SETS = ("router", "norms", "experts", "attention", "lora", "all")
"""What `select` takes. ``experts`` are routed and shared ones, ``router`` is all that decides or weighs experts,
``norms`` the norms outside of MoE layers, ``attention`` what a block has besides its feed-forward layer and norms,
``lora`` the adapters that were added, ``all`` everything.
"""


def check_sets(names: Sequence[str], field: str = "train") -> tuple[str, ...]:
    """The sets, each once.

    :param names: names of sets
    :param field: what the error calls them
    :raises ValueError: there are none, or one is unknown
    """
    if isinstance(names, str):
        names = (names,)
    if not names:
        raise ValueError(f"{field} names no parameters; choose some of {', '.join(PARAMETER_SETS)}.")
    for name in names:
        if name not in PARAMETER_SETS:
            raise ValueError(f"{field}={name!r}: choose some of {', '.join(PARAMETER_SETS)}.")
    return tuple(dict.fromkeys(names))


def select(model: nn.Module, names: Sequence[str], field: str = "train") -> list[str]:
    """Let exactly these sets of parameters train (``requires_grad``), in place.

    Scales and zero points of quantized modules never do: they belong to the format, and are no weights.

    :param model: a transformers model, or peft's wrapper around one
    :return: names of the parameters that train, as ``model.named_parameters()`` has them
    :raises ValueError: a set is unknown, or the model has nothing in it
    """
    names = check_sets(names, field)
    inner = inner_model(model)
    topology = student_topology(inner)
    adapters = adapter_parameters(model)
    fixed = quantization_parameters(model)
    found: dict[str, list[str]] = {name: [] for name in names}
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if path in fixed or not parameter.is_floating_point():
            continue
        if path in adapters:
            members = [name for name in names if name in ("lora", "all")]
        else:
            plain = plain_name(path)
            own = set_of(plain, block_of(plain, topology))
            members = [name for name in names if name in ("all", own)]
        for name in members:
            parameter.requires_grad_(True)
            found[name].append(path)
    for name, paths in found.items():
        if not paths:
            raise ValueError(_nothing(name, inner, field))
    return [path for path, parameter in model.named_parameters() if parameter.requires_grad]


def _nothing(name: str, model: PreTrainedModel, field: str) -> str:
    way_out = "add adapters (the settings of LoRA)" if name == "lora" else "leave it out"
    return f"{field}={name!r}: {type(model).__name__} has no such parameters; {way_out}."
