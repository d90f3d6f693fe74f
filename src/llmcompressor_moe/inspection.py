"""What a model is made of, what each drop would save and what its experts weigh in each scheme, from its config
alone: no weights are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.check.config import ReadConfig, implausible, parse_config, read_raw_config
from llmcompressor_moe.check.expected import lay_out, model_class
from llmcompressor_moe.check.report import Findings
from llmcompressor_moe.parts import EMBEDDINGS, EXPERTS, HEAD, PARTS, ROUTER, SHARED, block_of, part_of
from llmcompressor_moe.quantization.schemes import UNQUANTIZED, SchemeSpec
from llmcompressor_moe.slimming import DEFAULT_SCHEMES, SchemeSize, expert_linears, linears_of, scheme_sizes
from llmcompressor_moe.topology import Block, Topology, check_family, find_topology

__all__ = [
    "MoELayerSize",
    "ModelInspection",
    "PartSize",
    "Saving",
    "inspect_model",
    "read_config",
    "scheme_saving",
]


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
    """What one drop would save.

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
    :param expert_weights: weights of the routed experts' matrices, which schemes quantize
    :param expert_nbytes: bytes of the routed experts, biases too, in the dtype that the config names
    :param schemes: the routed experts in each scheme that was asked for
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
    expert_weights: int
    expert_nbytes: int
    schemes: list[SchemeSize]

    def nbytes_in(self, scheme: SchemeSize) -> int:
        """Bytes of the whole model with all routed experts in a scheme that fits."""
        return self.nbytes - self.expert_nbytes + scheme.nbytes

    def nbytes_at(self, bits: float) -> int:
        """Bytes of the whole model when a routed expert's weight takes that many bits in the mean."""
        return self.nbytes - round(self.expert_weights * (self.plain_bits - bits) / 8)

    def bits_at(self, nbytes: int) -> float:
        """Mean bits per routed expert's weight when the whole model takes that many bytes."""
        return self.plain_bits - 8 * (self.nbytes - nbytes) / self.expert_weights

    @property
    def plain_bits(self) -> int:
        """Bits of an unquantized weight."""
        return 8 * getattr(torch, self.dtype).itemsize


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
    """Parts of one block, and the values of its experts' matrices."""

    parts: dict[str, _Count] = field(default_factory=dict)
    expert_matrices: int = 0

    def of(self, *names: str) -> _Count:
        total = _Count()
        for name in names or tuple(self.parts):
            total.add(self.parts.get(name, _Count()))
        return total


def inspect_model(
    path: str | Path,
    schemes: Sequence[SchemeSpec] = DEFAULT_SCHEMES,
    group_size: int | None = None,
    beside: Collection[str] = (),
) -> ModelInspection:
    """Lay a model out on the meta device and count it.

    :param path: a checkpoint directory, or one with a config.json only, or the config.json itself
    :param schemes: schemes to size the routed experts in
    :param group_size: replaces the group size of their group-wise integer weights
    :param beside: kinds of other parts whose Linears share that group size
    :raises FileNotFoundError: there is no config.json
    :raises ValueError: transformers cannot build the model from it, or a scheme is unknown
    :raises NotAnMoEError: the model has no MoE layer
    """
    config = read_config(path)
    check_family(config.parsed)
    root = _root(path)
    cls = model_class(config)
    if cls is None:
        raise ValueError(
            f"{root}/config.json: architectures={config.raw.get('architectures')} with model_type="
            f"{config.raw.get('model_type')!r} is not a model of the installed transformers; upgrade "
            "transformers."
        )
    try:
        expected = lay_out(config)
    except Exception as error:
        raise ValueError(f"{root}/config.json: {cls.__name__} cannot be built from it: {error}") from error
    inspection = _inspection(root, config, expected.model, find_topology(expected.model))
    if schemes:
        others = linears_of(expected, beside)
        inspection.schemes = scheme_sizes(expert_linears(expected), schemes, group_size, config.dtype, others)
    return inspection


def scheme_saving(
    path: str | Path,
    parts: Collection[str],
    scheme: SchemeSpec,
    group_size: int | None,
    beside: Collection[str] = (),
) -> int:
    """Bytes that the Linears of kinds of parts other than routed experts save in a scheme.

    :param beside: kinds of parts that share the group size with them and with routed experts
    :raises ValueError: see `inspect_model`; or the scheme does not fit
    """
    config = read_config(path)
    expected = lay_out(config)
    others = (*expert_linears(expected), *linears_of(expected, beside))
    linears = linears_of(expected, parts)
    plain, packed = scheme_sizes(linears, [UNQUANTIZED, scheme], group_size, config.dtype, others)
    if packed.refused is not None:
        raise ValueError(f"{packed.scheme} does not fit the model's {' and '.join(parts)}: {packed.refused}.")
    return plain.nbytes - packed.nbytes


def _root(path: str | Path) -> Path:
    path = Path(path)
    return path.parent if path.name == "config.json" else path


def read_config(path: str | Path) -> ReadConfig:
    """A model's config; see `inspect_model`."""
    root = _root(path)
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
    dtype = config.dtype
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
        quantization=(config.quantization or {}).get("quant_method"),
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
        savings=_savings(topology, counts, whole.nbytes),
        expert_weights=total.expert_matrices,
        expert_nbytes=total.of(EXPERTS).nbytes,
        schemes=[],
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
    for name, parameter in model.named_parameters():
        block = block_of(name, topology)
        part = ends.get(id(parameter)) or part_of(name, block)
        size = parameter.numel()
        active = size * min(1.0, block.moe.top_k / block.moe.num_experts) if part == EXPERTS else size
        here = counts[block.index if block else None]
        here.parts.setdefault(part, _Count()).add(_Count(size, active, size * itemsize))
        if part == EXPERTS and parameter.ndim == 3:
            here.expert_matrices += size
    return counts


def _parameters(module: nn.Module | None) -> Iterable[nn.Parameter]:
    return module.parameters() if module is not None else ()


def _savings(topology: Topology, counts: dict[int | None, _BlockCount], whole: int) -> list[Saving]:
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
    ]


def _router_row(router: _Count, num_experts: int) -> tuple[int, float, int]:
    return router.parameters // num_experts, router.active / num_experts, router.nbytes // num_experts


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
