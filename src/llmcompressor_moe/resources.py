"""What a compression will need of memory, disk and reading, before it starts: from config.json, the sizes of the
files and the recipe alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.recipe import Recipe
from pydantic import BaseModel

from llmcompressor_moe.check.expected import build_meta, model_class
from llmcompressor_moe.criteria import part_metric
from llmcompressor_moe.forecast import ForecastError, forecast
from llmcompressor_moe.inspection import ModelInspection, inspect_model, read_config
from llmcompressor_moe.modifiers.damage_curves import measured_share
from llmcompressor_moe.modifiers.expert_drop import ExpertDropModifier
from llmcompressor_moe.modifiers.expert_width import ExpertWidthModifier
from llmcompressor_moe.modifiers.part_drop import PartDropModifier
from llmcompressor_moe.modifiers.quality_gate import QualityGateModifier
from llmcompressor_moe.modifiers.router_aware_quant import RouterAwareQuantModifier
from llmcompressor_moe.modifiers.router_calibration import RouterCalibrationModifier
from llmcompressor_moe.modifiers.trim import TrimModifier
from llmcompressor_moe.parts import EXPERTS, block_of, part_of
from llmcompressor_moe.profile.computing import available_memory
from llmcompressor_moe.profile.variants import passes_of
from llmcompressor_moe.sizes import bytes_text
from llmcompressor_moe.topology import find_topology, text_config

__all__ = [
    "ModelShape",
    "NotEnoughSpaceError",
    "ResourceEstimate",
    "check_disk_space",
    "estimate_resources",
    "model_shape",
    "wave_tokens",
]

# Python with torch, transformers and llm-compressor imported.
IMPORTS = 450_000_000
# Hidden states that one block holds at a time; see `profile.lockstep`.
_COPIES = 6
# The busiest expert sees about so many times its even share of the tokens.
_SKEW = 2
# Decoding a quantized expert holds about as many float32 copies of it.
_DECODING_COPIES = 3
# A pass for the sampling, one before and one after for the comparison on held-out data; trying schemes takes as
# long as a pass.
_ROUTER_AWARE_PASSES = 4
_GATE_PASSES = 2
# A few cores compute so much in float32 while a disk reads a byte.
_FLOPS_PER_BYTE = 40
_GATE_WINDOW = 2048
# Counts at which `counts.counts_to_measure` has each layer cut, at most.
_CURVE_POINTS = 4


class NotEnoughSpaceError(ValueError):
    """The disk has too little space for a run."""


class ResourceEstimate(BaseModel):
    """What a run will need, in bytes. An estimate: `memory` and `scratch` leave out what upstream's own algorithms
    (GPTQ's Hessians, for example) hold beside the weights.

    :param memory: of the process at its peak, files that are mapped left out
    :param scratch: files beside the output while the run lasts
    :param output: the new checkpoint
    :param output_at_most: whether ``output`` is only known to be no more than this
    :param reads: read from the checkpoint over all passes
    :param passes: over calibration data
    :param pass_work: what one pass takes, computing included: bytes that are read in that time
    """

    memory: int
    scratch: int
    output: int
    output_at_most: bool
    reads: int
    passes: int
    pass_work: int = 0

    @property
    def work(self) -> int:
        """What the whole run takes, in the unit of ``pass_work``."""
        return self.passes * self.pass_work + self.output

    @property
    def disk(self) -> int:
        """Free space that the output's file system must have."""
        return self.scratch + self.output


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that its config gives.

    :param blocks: how many
    :param moe_layers: how many of them have an MoE layer
    :param block_weights: parameters of the largest block without its routed experts
    :param expert_weights: parameters of the largest routed expert
    :param router_weights: parameters outside embeddings, attention and experts that router calibration may change
    :param expert_share: tokens that an expert sees when all see as many
    :param copies: hidden states per token that one block holds at a time
    :param quantized: whether the weights are stored quantized
    :param dtype: that the config names
    :param nbytes: of all weights in the dtype that the config names
    :param stored: bytes of the files; ``nbytes`` where there are none
    """

    hidden: int
    head_dim: int
    vocabulary: int
    blocks: int
    moe_layers: int
    block_weights: int
    expert_weights: int
    router_weights: int
    expert_share: float
    copies: int
    quantized: bool
    dtype: torch.dtype
    nbytes: int
    stored: int

    @property
    def active_weights(self) -> int:
        """Parameters of the blocks that compute for one token."""
        dense = self.blocks * self.block_weights
        return dense + round(max(0, self.nbytes // self.dtype.itemsize - dense) * self.expert_share)


def model_shape(path: str | Path, inspection: ModelInspection | None = None) -> ModelShape:
    """The shape of a checkpoint, from its config and the sizes of its files.

    :param inspection: what `inspect_model` gave for it, where that is known already
    :raises FileNotFoundError: there is no config.json
    :raises ValueError: transformers cannot build the model from it
    :raises NotAnMoEError: the model has no MoE layer
    """
    config = read_config(path)
    inspection = inspection or inspect_model(path, ())
    model = build_meta(config, model_class(config))
    topology = find_topology(model)
    text = text_config(model.config)
    blocks = dict.fromkeys((block.index for block in topology.blocks), 0)
    routers = 0
    for name, parameter in model.named_parameters():
        block = block_of(name, topology)
        if block is not None and part_of(name, block) != EXPERTS:
            blocks[block.index] += parameter.numel()
            routers += parameter.numel() if "norm" in name or part_of(name, block) == "router" else 0
    copies = _COPIES
    for moe in topology.moe_layers.values():
        experts = model.get_submodule(moe.experts)
        if len(inspect.signature(type(experts).forward).parameters) == 2:
            copies = max(copies, _COPIES + 2 * moe.num_experts)
    heads = getattr(text, "num_attention_heads", None) or 1
    return ModelShape(
        hidden=text.hidden_size,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        blocks=len(blocks),
        moe_layers=len(topology.moe_layers),
        block_weights=max(blocks.values()),
        expert_weights=max(layer.expert_parameters for layer in inspection.moe_layers),
        router_weights=routers,
        expert_share=max(layer.top_k / layer.experts for layer in inspection.moe_layers),
        copies=copies,
        quantized=inspection.quantization is not None,
        dtype=getattr(torch, inspection.dtype),
        nbytes=inspection.nbytes,
        stored=inspection.on_disk or inspection.nbytes,
    )


def wave_tokens(
    shape: ModelShape, compute_dtype: torch.dtype, device: torch.device | str, max_memory: int | None
) -> int:
    """Tokens that are inside one block at a time; see `RunOptions`.

    :param max_memory: bytes for hidden states, of which a quarter may be inside a block; None: what is available
    """
    memory = available_memory(device)
    room = memory if max_memory is None else min(memory, max_memory)
    most = max(1, room // 4 // (shape.hidden * compute_dtype.itemsize * shape.copies))
    # A power of two, so that a little more or less free memory does not change the order of sums.
    return 1 << (most.bit_length() - 1)


def estimate_resources(
    path: str | Path,
    shape: ModelShape,
    recipe: Recipe,
    *,
    samples: int,
    tokens: int,
    batch_tokens: int,
    wave: int,
    compute_dtype: torch.dtype,
    max_memory: int | None = None,
    requantize: bool = False,
    gated: bool = False,
) -> ResourceEstimate:
    """What applying a recipe to a checkpoint directory will need.

    :param path: the checkpoint, or its config.json
    :param shape: see `model_shape`
    :param samples: calibration samples
    :param tokens: in all of them
    :param batch_tokens: in one batch
    :param wave: see `wave_tokens`
    :param max_memory: bytes of hidden states that wait in memory; None: half of the available memory
    :param requantize: whether weights that are stored quantized are decoded
    :param gated: whether a `QualityGateModifier` stands at the end beside those of the recipe
    :raises ValueError: see `forecast`
    """
    modifiers = list(recipe.modifiers)
    gated = gated or any(isinstance(modifier, QualityGateModifier) for modifier in modifiers)
    size = compute_dtype.itemsize
    limit = available_memory("cpu") // 2 if max_memory is None else max_memory
    # Hidden states, and the rotary embeddings that every batch has.
    all_waiting = tokens * (shape.hidden + 2 * shape.head_dim) * size
    together = min(tokens, max(wave, batch_tokens))
    # Three matrices: an expert's inputs, outputs and weighted outputs, and what is between its matrices.
    in_expert = 3 * (shape.hidden + shape.expert_weights // (3 * shape.hidden))
    in_wave = together * size * shape.hidden * shape.copies
    in_wave += round(together * min(1, _SKEW * shape.expert_share)) * size * in_expert
    expert = shape.expert_weights * (4 * _DECODING_COPIES if shape.quantized else size)
    logits = _GATE_WINDOW * shape.vocabulary * 4 if gated else 0
    curves = _curves(modifiers, shape, tokens)
    if curves.number:
        # Of a sample and of one variant.
        logits = max(logits, 2 * tokens // max(samples, 1) * shape.vocabulary * size)
        all_waiting = max(all_waiting, curves.tokens * (shape.hidden + 2 * shape.head_dim) * size)
    output, at_most = _output(path, shape, recipe, requantize)
    others = _passes(modifiers, shape, samples) + (_GATE_PASSES if gated else 0)
    passes = others + round(curves.passes)
    return ResourceEstimate(
        memory=IMPORTS + shape.block_weights * size + expert + in_wave + min(all_waiting, limit) + logits,
        scratch=max(0, all_waiting - limit)
        + _snapshots(modifiers, shape, tokens, size)
        + _changed(modifiers, shape, output, requantize),
        output=output,
        output_at_most=at_most,
        # Writing reads what it copies.
        reads=(others + curves.number) * shape.stored + min(output, shape.stored),
        passes=passes,
        pass_work=shape.stored + round(2 * tokens * shape.active_weights / _FLOPS_PER_BYTE),
    )


def check_disk_space(
    estimate: ResourceEstimate, output: str | Path, free_space: Callable[[Path], int], *, already: int = 0
) -> None:
    """Refuse a run that would fill the disk.

    :param free_space: gives the free bytes of the file system of a directory
    :param already: bytes that an interrupted run has taken of what the estimate counts
    :raises NotEnoughSpaceError: names what is needed and what there is
    """
    target = Path(output).absolute()
    parent = next(path for path in target.parents if path.exists())
    free = free_space(parent)
    if free + already < estimate.disk:
        raise NotEnoughSpaceError(
            f"output {str(output)!r}: the run needs {bytes_text(estimate.disk)} "
            f"({bytes_text(estimate.output)} for the checkpoint, {bytes_text(estimate.scratch)} of scratch beside "
            f"it), and {str(parent)!r} has {bytes_text(free)} free. Choose an --output on another disk, free "
            "space, raise --max-memory, calibrate on fewer tokens, or drop more."
        )


def _output(path: str | Path, shape: ModelShape, recipe: Recipe, requantize: bool) -> tuple[int, bool]:
    """Bytes of the new checkpoint, and whether that is an upper bound."""
    if shape.quantized and not requantize:
        # What is stored of it is not what the config's dtype says.
        return shape.stored, True
    try:
        last = forecast(path, recipe)[-1]
    except ForecastError:
        return max(shape.nbytes, shape.stored), True
    # Tensors that no parameter is made of go along.
    beside = 0 if shape.quantized else max(0, shape.stored - shape.nbytes)
    return last.nbytes + beside, last.at_most


def _passes(modifiers: list[Modifier], shape: ModelShape, samples: int) -> int:
    """Passes over the calibration data. Those that go on from a block in the middle count by their share."""
    if not samples:
        return 0
    total, shared = 0.0, False
    for modifier in modifiers:
        if isinstance(modifier, TrimModifier):
            if modifier._needs_data():
                total += _trim_passes(modifier, shape, shared and modifier.share_statistics)
            shared = shared or bool(modifier._statistics())
            continue
        shared = False
        if isinstance(modifier, RouterAwareQuantModifier):
            total += _ROUTER_AWARE_PASSES + modifier.requires_calibration_data
        elif isinstance(modifier, RouterCalibrationModifier):
            total += 2
        elif isinstance(modifier, ExpertWidthModifier):
            total += modifier.statistics_passes()
        elif not isinstance(modifier, QualityGateModifier):
            total += modifier.requires_calibration_data
    return round(total)


def _trim_passes(modifier: TrimModifier, shape: ModelShape, shared: bool) -> float:
    if not isinstance(modifier, PartDropModifier):
        return 0 if shared or not modifier._statistics() else 1
    parts = shape.moe_layers if modifier._part() == "layer" else shape.blocks
    rounds = 1
    if modifier.search == "greedy":
        rounds = modifier.num_drop or int(parts * (modifier.drop_ratio or 1))
    if part_metric(modifier.metric).from_profile:
        return rounds - shared
    # Each part is left out once, from its block on.
    return rounds * (1 + parts / 2)


@dataclass(frozen=True)
class _Curves:
    """What measuring damage curves takes beside the passes for statistics.

    :param number: how often they are measured; each time the weights are read once
    :param passes: that all of them compute as much as
    :param tokens: whose hidden states wait at the end of one, each variant's counted
    """

    number: int = 0
    passes: float = 0.0
    tokens: int = 0


def _curves(modifiers: list[Modifier], shape: ModelShape, tokens: int) -> _Curves:
    number = sum(map(_measures_curves, modifiers))
    if not number or not tokens:
        return _Curves()
    changed = [*range(shape.blocks - shape.moe_layers, shape.blocks)] * _CURVE_POINTS
    share = measured_share(changed, shape.blocks, tokens)
    return _Curves(
        number,
        number * share * passes_of(changed, shape.blocks),
        round(share * tokens) * (1 + len(changed)),
    )


def _measures_curves(modifier: Modifier) -> bool:
    if isinstance(modifier, ExpertWidthModifier):
        return modifier.measures_curves()
    return (
        isinstance(modifier, ExpertDropModifier)
        and modifier.scope == "sensitivity"
        and modifier._needs_data()
    )


def _snapshots(modifiers: list[Modifier], shape: ModelShape, tokens: int, size: int) -> int:
    """A snapshot of a pass, and the one that replaces it."""
    kept = any(isinstance(m, TrimModifier) and m._statistics() for m in modifiers)
    return 2 * tokens * shape.hidden * size if kept else 0


def _changed(modifiers: list[Modifier], shape: ModelShape, output: int, requantize: bool) -> int:
    """Weights that the recipe changes, at most."""
    total = 0
    for modifier in modifiers:
        if isinstance(modifier, TrimModifier | REAPPruningModifier | QualityGateModifier):
            continue
        if isinstance(modifier, RouterCalibrationModifier):
            total += 4 * shape.router_weights
            continue
        if isinstance(modifier, ExpertWidthModifier):
            # Down projections, one of three matrices of an expert.
            total += shape.nbytes // 3 if modifier.refit else 0
            continue
        # Rounding to nearest only adds what is stored compressed; other algorithms also update the weights.
        nearest = type(modifier) is QuantizationModifier or (
            isinstance(modifier, RouterAwareQuantModifier) and modifier.algorithm == "rtn"
        )
        total += output + (0 if nearest else shape.nbytes)
    return total
