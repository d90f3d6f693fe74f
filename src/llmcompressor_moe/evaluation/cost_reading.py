"""What a checkpoint costs to store and to run, read from the headers of its files and its config: no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.check.config import ReadConfig
from llmcompressor_moe.check.expected import ExpectedModel, lay_out
from llmcompressor_moe.check.naming import Naming, find_naming
from llmcompressor_moe.checkpoint.layout import CheckpointLayout, TensorInfo, whole_layout
from llmcompressor_moe.evaluation.cost import AttentionCost, ExpertBytes, ModelCost, PartCost
from llmcompressor_moe.inspection import inspect_model, read_config
from llmcompressor_moe.parts import EMBEDDINGS, EXPERTS, HEAD, OTHER, PARTS, ROUTER, SHARED, block_of, part_of
from llmcompressor_moe.topology import Block, Topology

__all__ = ["model_cost"]

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LATENT = "kv_lora_rank"


def model_cost(
    path: str | Path,
    *,
    contexts: Sequence[int] = (1024,),
    batches: Sequence[int] = (1,),
    routing: Mapping[int, Sequence[float]] | None = None,
) -> ModelCost:
    """Count what a checkpoint directory holds and what a token of it costs.

    :param contexts: context lengths to give operations and bytes at
    :param batches: batch sizes to give bytes at
    :param routing: see `ModelCost.decode_at`
    :raises FileNotFoundError: there is no config.json
    :raises ValueError: a header or the config cannot be read, a number is not positive, or ``routing`` does not
        fit the model
    :raises NotAnMoEError: the model has no MoE layer
    """
    for name, values in (("contexts", contexts), ("batches", batches)):
        for value in values:
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
    inspection = inspect_model(path, ())
    config = read_config(path)
    layout = whole_layout(path)
    expected = lay_out(config, layout.tensors)
    stored = _read(expected, layout)
    flops, notes = _linear_flops(expected.model, expected.topology)
    attention, more = _attention(config, expected.model, expected.topology)
    experts = [
        ExpertBytes(block=index, top_k=moe.top_k, nbytes=stored.experts[index])
        for index, moe in sorted(expected.topology.moe_layers.items())
    ]
    counted = {part.part: part for part in inspection.parts}
    cost = ModelCost(
        path=str(path),
        nbytes=layout.nbytes,
        header_nbytes=sum((layout.path / file).stat().st_size for file in layout.files) - layout.nbytes,
        parameters=inspection.parameters,
        active_parameters=inspection.active_parameters,
        parts=[
            PartCost(
                part=part,
                parameters=counted[part].parameters if part in counted else 0,
                active_parameters=counted[part].active_parameters if part in counted else 0,
                nbytes=stored.parts.get(part, 0),
                read_nbytes=stored.read.get(part, 0.0),
            )
            for part in PARTS
            if part in counted or part in stored.parts
        ],
        linear_flops=flops,
        attention=attention,
        experts=experts,
        weight_nbytes=stored.weights,
        row_nbytes=stored.rows,
        kv_itemsize=_kv_itemsize(config, getattr(torch, inspection.dtype)),
        flops=[],
        decode=[],
        notes=[*notes, *more, *stored.notes],
    )
    cost.flops = [cost.flops_at(context) for context in contexts]
    cost.decode = [cost.decode_at(batch, context, routing) for batch in batches for context in contexts]
    return cost


@dataclass
class _Stored:
    """Bytes of a checkpoint by what they are for.

    :param parts: part -> stored bytes
    :param read: part -> bytes that decode reads for one token
    :param weights: bytes that every token passes
    :param rows: bytes of one row of each embedding
    :param experts: block index -> bytes of each routed expert
    """

    parts: dict[str, int] = field(default_factory=dict)
    read: dict[str, float] = field(default_factory=dict)
    weights: int = 0
    rows: float = 0.0
    experts: dict[int, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """What a stored tensor belongs to.

    :param block: block index, None outside
    :param expert: index of the routed expert; None for no expert's, and for tensors that hold all experts
    :param runtime: name of the parameter in the model that it (or its Linear's weight) becomes; empty for
        tensors that the model has no place for
    """

    part: str
    block: int | None = None
    expert: int | None = None
    runtime: str = ""


class _Placer:
    """Finds the places of a checkpoint's tensors."""

    def __init__(self, expected: ExpectedModel, naming: Naming):
        self.expected, self.topology, self.naming = expected, expected.topology, naming
        model = expected.model
        self.modules = dict(model.named_modules())
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        ends = {id(p): EMBEDDINGS for p in inputs.parameters()}
        for parameter in outputs.parameters() if outputs is not None else ():
            ends.setdefault(id(parameter), HEAD)
        self.ends = {
            name: ends[id(parameter)]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if id(parameter) in ends
        }

    def place(self, tensor: TensorInfo) -> _Place:
        module = tensor.name.rpartition(".")[0]
        linear = self.expected.linearized.get(module)
        if linear is not None:
            return _Place(EXPERTS, linear.layer, _expert_of(tensor.name), module)
        for name in (tensor.name, f"{module}.weight"):
            runtime, _ = self.naming.runtime_of(name)
            if runtime in self.naming.runtime_state:
                return self._known(tensor.name, runtime)
        # Scales of the KV cache stand in the attention module itself.
        runtime, _ = self.naming.runtime_of(tensor.name)
        if runtime.rpartition(".")[0] in self.modules:
            return self._known(tensor.name, runtime)
        return _Place(OTHER)

    def _known(self, name: str, runtime: str) -> _Place:
        block: Block | None = block_of(runtime, self.topology)
        part = self.ends.get(runtime) or part_of(runtime, block)
        expert = _expert_of(name) if part == EXPERTS else None
        return _Place(part, block.index if block else None, expert, runtime)


def _expert_of(name: str) -> int | None:
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def _read(expected: ExpectedModel, layout: CheckpointLayout) -> _Stored:
    """Sort a checkpoint's bytes."""
    model, topology = expected.model, expected.topology
    placer = _Placer(expected, find_naming(model, layout.tensors))
    moes = topology.moe_layers
    stored = _Stored(experts={index: [0.0] * moe.num_experts for index, moe in moes.items()})
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    unplaced = 0
    for tensor in layout.tensors.values():
        place = placer.place(tensor)
        stored.parts[place.part] = stored.parts.get(place.part, 0) + tensor.nbytes
        unplaced += tensor.nbytes if not place.runtime else 0
        # A packed matrix's shape says how to unpack it; no kernel reads it.
        if not _runs(place, topology) or tensor.name.endswith(".weight_shape"):
            continue
        if place.part == EXPERTS:
            experts = stored.experts[place.block]
            for expert in range(len(experts)) if place.expert is None else (place.expert,):
                experts[expert] += tensor.nbytes / (len(experts) if place.expert is None else 1)
            continue
        holder = placer.modules.get(place.runtime.rpartition(".")[0])
        read = 0.0
        if isinstance(holder, nn.Embedding):
            read = tensor.nbytes / holder.num_embeddings
            stored.rows += read
        # A tied table is one row going in and the whole of it coming out.
        if not isinstance(holder, nn.Embedding) or (tied and place.part == EMBEDDINGS):
            read += tensor.nbytes
            stored.weights += tensor.nbytes
        stored.read[place.part] = stored.read.get(place.part, 0.0) + read
    stored.read[EXPERTS] = sum(
        sum(nbytes) * min(1.0, moes[index].top_k / len(nbytes)) for index, nbytes in stored.experts.items()
    )
    if unplaced:
        stored.notes.append(
            f"{unplaced} bytes in the files belong to no module of the model and are not read."
        )
    return stored


def _runs(place: _Place, topology: Topology) -> bool:
    """Whether a token of text passes what stands there: the decoder and the head, no vision tower."""
    decoder = topology.stack.rpartition(".")[0]
    inside = place.runtime.startswith(f"{decoder}.") if decoder else True
    return bool(place.runtime) and (inside or place.block is not None or place.part in (HEAD, EMBEDDINGS))


def _linear_flops(model: PreTrainedModel, topology: Topology) -> tuple[int, list[str]]:
    """Operations of a token in all matrices, and what is not counted."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    weights = 0
    skipped: dict[str, None] = {}
    for path, module in model.named_modules():
        if module is inputs or isinstance(module, nn.Embedding):
            continue
        for leaf, parameter in module.named_parameters(path, recurse=False):
            block = block_of(leaf, topology)
            part = HEAD if module is outputs else part_of(leaf, block)
            if parameter.ndim < 2 or not _runs(_Place(part, block and block.index, None, leaf), topology):
                continue
            if part == EXPERTS:
                # Two dimensions are the experts' biases.
                if parameter.ndim == 3:
                    moe = block.moe
                    weights += parameter[0].numel() * min(moe.top_k, moe.num_experts)
            elif isinstance(module, nn.Linear) or _is_matrix(leaf, part):
                weights += parameter.numel()
            else:
                skipped[re.sub(r"\.\d+(?=\.)", ".*", leaf)] = None
    notes = [f"Operations with {name} are not counted in FLOPs." for name in skipped]
    return 2 * weights, notes


def _is_matrix(name: str, part: str) -> bool:
    """Whether a parameter of a router or of shared experts multiplies, though its module is no Linear."""
    return (part == ROUTER and name.endswith(".weight")) or part == SHARED


def _attention(
    config: ReadConfig, model: PreTrainedModel, topology: Topology
) -> tuple[list[AttentionCost], list[str]]:
    """Softmax attention by block, and what other mixers are not counted."""
    found: list[AttentionCost] = []
    blocks_of: dict[str, list[int]] = {}
    for block in topology.blocks:
        for name, module in _mixers(model.get_submodule(block.name)):
            kind = type(module).__name__
            cost = _softmax_attention(config, block.index, module)
            if cost is None:
                text = f"{kind} ({name}) is not plain softmax attention: its Linears are counted, its state is not"
                blocks_of.setdefault(text, []).append(block.index)
                continue
            found.append(cost)
            if any("indexer" in child for child, _ in module.named_children()):
                text = (
                    f"{kind} ({name}) chooses tokens to attend to: counted as if it attended to all of them"
                )
                blocks_of.setdefault(text, []).append(block.index)
    return found, [f"{text}, in blocks {blocks}." for text, blocks in blocks_of.items()]


def _mixers(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A block's children that mix tokens: those that know which layer they are, for their cache."""
    for name, child in block.named_children():
        if hasattr(child, "layer_idx") and not hasattr(child, "experts"):
            yield name, child


def _softmax_attention(config: ReadConfig, block: int, module: nn.Module) -> AttentionCost | None:
    """The sizes of an attention module that has the usual projections; None for anything else."""
    out = getattr(module, "o_proj", None) or getattr(module, "out_proj", None)
    latent = getattr(module, _LATENT, None)
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    if not isinstance(out, nn.Linear) or convolves:
        return None
    if latent is not None:
        qk_dim, v_dim = module.qk_head_dim, module.v_head_dim
        cached = latent + module.qk_rope_head_dim
    else:
        keys = getattr(module, "k_proj", None)
        if not isinstance(keys, nn.Linear) or not hasattr(module, "q_proj"):
            return None
        qk_dim = module.head_dim
        v_dim = getattr(module, "v_head_dim", qk_dim)
        cached = keys.out_features // qk_dim * (qk_dim + v_dim)
    return AttentionCost(
        block=block,
        heads=out.in_features // v_dim,
        qk_dim=qk_dim,
        v_dim=v_dim,
        cached_values=cached,
        window=_window(config, block, module),
    )


def _window(config: ReadConfig, block: int, module: nn.Module) -> int | None:
    """Tokens that a layer looks back; a chunk counts as a window."""
    types = config.value("layer_types")
    if types and block < len(types):
        limit = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
        return config.value(limit[types[block]]) if types[block] in limit else None
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return config.value("sliding_window") if config.value("use_sliding_window", True) else None


def _kv_itemsize(config: ReadConfig, dtype: torch.dtype) -> float:
    scheme = (config.quantization or {}).get("kv_cache_scheme") or {}
    return scheme.get("num_bits", 8 * dtype.itemsize) / 8
