"""What a model is made of and what each drop would save, from its config alone: no weights are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.check.config import ReadConfig, implausible, parse_config, read_raw_config
from llmcompressor_moe.check.expected import build_meta, model_class
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.topology import Block, Topology, find_topology

__all__ = ["PARTS", "MoELayerSize", "ModelInspection", "PartSize", "Saving", "inspect_model"]

EMBEDDINGS, ATTENTION, ROUTER, EXPERTS = "embeddings", "attention", "router", "experts"
SHARED, DENSE, NORMS, HEAD, OTHER = "shared experts", "dense FFN", "norms", "head", "other"
PARTS = (EMBEDDINGS, ATTENTION, ROUTER, EXPERTS, SHARED, DENSE, NORMS, HEAD, OTHER)

_DENSE_NAMES = ("mlp", "feed_forward", "ffn", "shared")
_SCALE_BYTES = 2
_GROUP_SIZE = 128


class PartSize(BaseModel):
    """Parameters of one kind of part over the whole model.

    :param active_parameters: those that one token passes
    :param nbytes: in the dtype that the config names
    """

    part: str
    parameters: int
    active_parameters: int
    nbytes: int


class MoELayerSize(BaseModel):
    """One MoE layer.

    :param index: block index
    :param groups: groups that the router limits its choice to (1: not limited)
    :param shared_experts: whether every token passes shared experts here
    :param parameters: router, experts and shared experts
    :param expert_parameters: one routed expert
    """

    index: int
    experts: int
    top_k: int
    groups: int
    groups_kept: int
    shared_experts: bool
    parameters: int
    expert_parameters: int


class Saving(BaseModel):
    """What one step would save.

    :param active_parameters: parameters that a token would no longer pass
    :param share: share of the model's bytes
    """

    step: str
    parameters: int
    active_parameters: int
    nbytes: int
    share: float


class ModelInspection(BaseModel):
    """Everything that a config says about the size of a model.

    :param parameters: tied weights counted once
    :param active_parameters: parameters that one token passes; the whole embedding table is counted
    :param nbytes: in the dtype that the config names, before any quantization
    :param on_disk: bytes of the safetensors files, None where there are none
    :param quantization: the quantization method that the config names
    """

    path: str
    architecture: str
    model_type: str
    dtype: str
    blocks: int
    parameters: int
    active_parameters: int
    nbytes: int
    on_disk: int | None
    quantization: str | None
    parts: list[PartSize]
    moe_layers: list[MoELayerSize]
    dropped_moe_layers: list[int]
    savings: list[Saving]


@dataclass
class _Count:
    """Parameters and bytes of a part: all of them, and those that one token passes."""

    parameters: int = 0
    active: float = 0.0
    nbytes: int = 0

    def add(self, other: _Count) -> None:
        self.parameters += other.parameters
        self.active += other.active
        self.nbytes += other.nbytes


@dataclass
class _BlockCount:
    """Parts of one block, and the experts' matrices that quantization would pack."""

    parts: dict[str, _Count] = field(default_factory=dict)
    expert_matrices: int = 0

    def of(self, *names: str) -> _Count:
        total = _Count()
        for name in names or tuple(self.parts):
            total.add(self.parts.get(name, _Count()))
        return total


def inspect_model(path: str | Path) -> ModelInspection:
    """Lay a model out on the meta device and count it.

    :param path: a checkpoint directory, or one with a config.json only, or the config.json itself
    :raises FileNotFoundError: there is no config.json
    :raises ValueError: transformers cannot build the model from it
    :raises NotAnMoEError: the model has no MoE layer
    """
    root = Path(path)
    root = root.parent if root.name == "config.json" else root
    config = _read(root)
    cls = model_class(config)
    if cls is None:
        raise ValueError(
            f"{root}/config.json: architectures={config.raw.get('architectures')} with model_type="
            f"{config.raw.get('model_type')!r} is no model of the installed transformers; upgrade "
            "transformers."
        )
    try:
        model = build_meta(config, cls)
    except Exception as error:
        raise ValueError(f"{root}/config.json: {cls.__name__} cannot be built from it: {error}") from error
    topology = find_topology(model)
    return _inspection(root, config, model, topology)


def _read(root: Path) -> ReadConfig:
    if not (root / "config.json").is_file():
        raise FileNotFoundError(f"{str(root)!r} has no config.json; name the directory of a model.")
    findings = Findings()
    raw = read_raw_config(root, findings)
    config = None if raw is None or implausible(raw, findings) else parse_config(root, raw, findings)
    if config is None:
        raise ValueError(f"{root}/config.json: " + "; ".join(map(str, findings.all)))
    return config


def _inspection(
    root: Path, config: ReadConfig, model: PreTrainedModel, topology: Topology
) -> ModelInspection:
    dtype = config.parsed.dtype or torch.get_default_dtype()
    counts = _count(model, topology, dtype.itemsize)
    total = _BlockCount()
    for block in counts.values():
        for part, count in block.parts.items():
            total.parts.setdefault(part, _Count()).add(count)
        total.expert_matrices += block.expert_matrices
    whole = total.of()
    files = sorted(root.glob("*.safetensors"))
    written = config.raw_text.get("per_layer_config") or {}
    return ModelInspection(
        path=str(root),
        architecture=type(model).__name__,
        model_type=topology.model_type,
        dtype=str(dtype).removeprefix("torch."),
        blocks=len(topology.blocks),
        parameters=whole.parameters,
        active_parameters=round(whole.active),
        nbytes=whole.nbytes,
        on_disk=sum(file.stat().st_size for file in files) if files else None,
        quantization=(config.raw.get("quantization_config") or {}).get("quant_method"),
        parts=[
            PartSize(
                part=part,
                parameters=count.parameters,
                active_parameters=round(count.active),
                nbytes=count.nbytes,
            )
            for part in PARTS
            if (count := total.parts.get(part)) is not None
        ],
        moe_layers=[_moe_layer(block, counts[block.index]) for block in topology.blocks if block.moe],
        dropped_moe_layers=sorted(
            int(index) for index, layer in written.items() if "mlp" in (layer.get("skip") or ())
        ),
        savings=_savings(topology, counts, whole.nbytes, total.expert_matrices, dtype.itemsize),
    )


def _moe_layer(block: Block, count: _BlockCount) -> MoELayerSize:
    moe = block.moe
    return MoELayerSize(
        index=block.index,
        experts=moe.num_experts,
        top_k=moe.top_k,
        groups=moe.num_groups,
        groups_kept=moe.groups_kept,
        shared_experts=bool(moe.shared_experts),
        parameters=count.of(ROUTER, EXPERTS, SHARED).parameters,
        expert_parameters=count.of(EXPERTS).parameters // moe.num_experts,
    )


def _count(model: PreTrainedModel, topology: Topology, itemsize: int) -> dict[int | None, _BlockCount]:
    """Block index (None: outside all blocks) -> its parts; a tensor with several names counts once."""
    counts: dict[int | None, _BlockCount] = {None: _BlockCount()}
    counts |= {block.index: _BlockCount() for block in topology.blocks}
    ends = {id(p): EMBEDDINGS for p in _parameters(model.get_input_embeddings())}
    for parameter in _parameters(model.get_output_embeddings()):
        ends.setdefault(id(parameter), HEAD)
    blocks = {f"{block.name}.": block for block in topology.blocks}
    for name, parameter in model.named_parameters():
        depth = topology.stack.count(".") + 2
        block = blocks.get(".".join(name.split(".")[:depth]) + ".")
        part = ends.get(id(parameter)) or _part_of(model, name, block)
        size = parameter.numel()
        active = size * min(1.0, block.moe.top_k / block.moe.num_experts) if part == EXPERTS else size
        here = counts[block.index if block else None]
        here.parts.setdefault(part, _Count()).add(_Count(size, active, size * itemsize))
        if part == EXPERTS and parameter.ndim == 3:
            here.expert_matrices += size
    return counts


def _parameters(module: nn.Module | None) -> Iterable[nn.Parameter]:
    return module.parameters() if module is not None else ()


def _part_of(model: PreTrainedModel, name: str, block: Block | None) -> str:
    """The kind of part that a parameter belongs to, from where it stands."""
    if block is None:
        return NORMS if "norm" in name else OTHER
    moe = block.moe
    if moe is not None:
        if name.startswith(f"{moe.experts}."):
            return EXPERTS
        if any(name.startswith(f"{shared}.") for shared in moe.shared_experts):
            return SHARED
        if (moe.router and name.startswith(f"{moe.router}.")) or (
            not moe.inline and name.startswith(f"{moe.module}.")
        ):
            return ROUTER
    child = name.removeprefix(f"{block.name}.").split(".")[0]
    if "norm" in child:
        return NORMS
    return DENSE if any(word in child for word in _DENSE_NAMES) else ATTENTION


def _savings(
    topology: Topology, counts: dict[int | None, _BlockCount], whole: int, matrices: int, itemsize: int
) -> list[Saving]:
    """Savings per step, means over the blocks that have an MoE layer where those differ."""
    with_moe = [(counts[block.index], block.moe) for block in topology.blocks if block.moe]
    blocks = [count.of() for count, _ in with_moe]
    layers = [count.of(ROUTER, EXPERTS, SHARED) for count, _ in with_moe]
    alike = len({count.parameters for count in blocks}) == 1
    mean = "" if alike else " (mean)"
    experts = _Count()
    for count, moe in with_moe:
        routed = count.of(EXPERTS)
        rows = _Count(*_router_row(count.of(ROUTER), moe.num_experts))
        experts.add(_Count(routed.parameters // moe.num_experts, 0.0, routed.nbytes // moe.num_experts))
        experts.add(rows)
    return [
        _saving(f"Block Drop: one block with an MoE layer{mean}", _mean(blocks), whole),
        _saving(f"Layer Drop: one MoE layer{mean}", _mean(layers), whole),
        _saving("Expert Drop: one expert in every layer", experts, whole),
        *(
            _saving(
                f"W{bits}A16 experts, groups of {_GROUP_SIZE}",
                _Count(0, 0.0, matrices * itemsize - _packed(matrices, bits)),
                whole,
            )
            for bits in (4, 8)
        ),
    ]


def _router_row(router: _Count, num_experts: int) -> tuple[int, float, int]:
    return router.parameters // num_experts, router.active / num_experts, router.nbytes // num_experts


def _packed(values: int, bits: int) -> int:
    """Bytes of packed weights and their scales."""
    return math.ceil(values * bits / 8) + math.ceil(values / _GROUP_SIZE) * _SCALE_BYTES


def _mean(counts: list[_Count]) -> _Count:
    total = _Count()
    for count in counts:
        total.add(count)
    return _Count(
        round(total.parameters / len(counts)), total.active / len(counts), round(total.nbytes / len(counts))
    )


def _saving(step: str, count: _Count, whole: int) -> Saving:
    return Saving(
        step=step,
        parameters=count.parameters,
        active_parameters=round(count.active),
        nbytes=count.nbytes,
        share=count.nbytes / whole,
    )
