"""What a recipe leaves of a model, step by step, from the model's config alone: no weights, no data."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from pydantic import BaseModel

from llmcompressor_moe.check.expected import build_meta, model_class
from llmcompressor_moe.inspection import ModelInspection, inspect_model, read_config, scheme_saving
from llmcompressor_moe.modifiers.block_drop import BlockDropModifier
from llmcompressor_moe.modifiers.expert_drop import ExpertDropModifier
from llmcompressor_moe.modifiers.expert_width import ExpertWidthModifier
from llmcompressor_moe.modifiers.part_drop import PartDropModifier
from llmcompressor_moe.modifiers.quality_gate import QualityGateModifier
from llmcompressor_moe.modifiers.router_aware_quant import RouterAwareQuantModifier
from llmcompressor_moe.modifiers.router_calibration import RouterCalibrationModifier
from llmcompressor_moe.parts import ATTENTION, DENSE, SHARED
from llmcompressor_moe.plan import amount_of
from llmcompressor_moe.quantization.refusals import check_servable
from llmcompressor_moe.quantization.schemes import resolve_scheme, resolve_schemes, shares_group_size
from llmcompressor_moe.sizes import bytes_text, parse_bytes
from llmcompressor_moe.surgery.config import describe_layers, describe_widths, keep_blocks
from llmcompressor_moe.surgery.width import width_fields, width_of
from llmcompressor_moe.topology import find_topology

__all__ = ["ForecastError", "Step", "forecast"]


class ForecastError(ValueError):
    """A step's size depends on data, or is not known here."""


class Step(BaseModel):
    """A model after one modifier of a recipe.

    :param step: the modifier with its amount
    :param nbytes: bytes of all tensors
    :param bits: mean bits per routed expert's weight, scales counted
    :param at_most: whether ``nbytes`` and ``bits`` are a budget that the step stays within
    """

    step: str
    parameters: int
    active_parameters: int
    nbytes: int
    bits: float
    at_most: bool = False


@dataclass
class _Shape:
    """A model's blocks that are left, in order, and experts per MoE layer (0: dropped), by original index; and the
    config fields that say how wide the experts of a layer are, where they have been cut.
    """

    blocks: list[int]
    experts: dict[int, int]
    widths: dict[int, Mapping[str, int]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """Blocks that have their MoE layer."""
        return [index for index in self.blocks if self.experts.get(index)]


def forecast(path: str | Path, recipe: Recipe) -> list[Step]:
    """The model as it is, then after each modifier of the recipe.

    Which blocks, layers and experts go is up to the data, and does not matter where they are alike. Block Drop is
    taken to choose among blocks with an MoE layer.

    :param path: a model's directory, or its config.json
    :raises ForecastError: a threshold or a plan decides how much goes, a modifier is not one of this package,
        a scheme does not fit or a budget is too small
    :raises ValueError: see `inspect_model`; or more is to go than is there, or vLLM cannot serve a scheme
    """
    inspection = inspect_model(path, ())
    shape = _Shape(
        list(range(inspection.blocks)),
        dict.fromkeys(inspection.dropped_moe_layers, 0)
        | {layer.index: layer.experts for layer in inspection.moe_layers},
    )
    steps = [_step("as it is", inspection, inspection.plain_bits)]
    for modifier in recipe.modifiers:
        name = type(modifier).__name__.removesuffix("Modifier")
        if isinstance(modifier, PartDropModifier | ExpertDropModifier):
            amount = _drop(shape, modifier)
            with _trimmed(path, shape) as directory:
                inspection = inspect_model(directory, ())
            steps.append(_step(f"{name}: {amount}", inspection, inspection.plain_bits))
        elif isinstance(modifier, ExpertWidthModifier):
            amount = _narrow(path, shape, modifier)
            with _trimmed(path, shape) as directory:
                inspection = inspect_model(directory, ())
            steps.append(_step(f"{name}: {amount}", inspection, inspection.plain_bits))
        elif isinstance(modifier, RouterAwareQuantModifier):
            with _trimmed(path, shape) as directory:
                steps.append(_slim(directory, name, modifier))
        elif not isinstance(modifier, QualityGateModifier | RouterCalibrationModifier):
            # Those two weigh nothing.
            raise ForecastError(f"{name}: sizes after it are not known from a config.")
    return steps


def _step(step: str, inspection: ModelInspection, bits: float, saved: int = 0, at_most: bool = False) -> Step:
    return Step(
        step=step,
        parameters=inspection.parameters,
        active_parameters=inspection.active_parameters,
        nbytes=inspection.nbytes_at(bits) - saved,
        bits=bits,
        at_most=at_most,
    )


def _drop(shape: _Shape, modifier: Modifier) -> str:
    """Take from the shape what a drop modifier takes; says how much that was."""
    if modifier.plan_path is not None or getattr(modifier, "threshold", None) is not None:
        raise ForecastError(
            f"{type(modifier).__name__}: a threshold or a plan decides how much goes; give num_drop."
        )
    if isinstance(modifier, ExpertDropModifier):
        return _drop_experts(shape, modifier)
    if isinstance(modifier, BlockDropModifier):
        total, what = len(shape.blocks), "blocks"
        gone = _gone(modifier, modifier.blocks, shape.layers, total, what)
        shape.blocks = [index for index in shape.blocks if index not in gone]
    else:
        total, what = len(shape.layers), "MoE layers"
        gone = _gone(modifier, modifier.layers, shape.layers, total, what)
        shape.experts.update(dict.fromkeys(gone, 0))
    return f"{len(gone)} of {total} {what}"


def _gone(
    modifier: PartDropModifier, named: list[int] | None, candidates: list[int], total: int, what: str
) -> list[int]:
    if named is not None:
        return named
    free = [index for index in candidates if index not in modifier.protect]
    count = amount_of(modifier.num_drop, modifier.drop_ratio, total, what)
    if count > len(free):
        raise ForecastError(f"{type(modifier).__name__}: {count} {what} are to go, {len(free)} can.")
    return free[-count:]


def _drop_experts(shape: _Shape, modifier: ExpertDropModifier) -> str:
    before = {index: shape.experts[index] for index in shape.layers}
    for index, count in before.items():
        if modifier.experts is not None:
            shape.experts[index] = count - len(modifier.experts.get(index, ()))
        elif index not in modifier.protect:
            shape.experts[index] = count - amount_of(
                modifier.num_drop, modifier.drop_ratio, count, f"experts of layer {index}"
            )
    gone = sum(before[index] - shape.experts[index] for index in before)
    return f"{gone / len(before):g} of {sum(before.values()) / len(before):g} experts per layer"


def _narrow(path: str | Path, shape: _Shape, modifier: ExpertWidthModifier) -> str:
    """Take channels from the shape's experts; says how many."""
    if modifier.plan_path is not None:
        raise ForecastError(f"{type(modifier).__name__}: a plan decides the width; give drop_ratio or width.")
    with _trimmed(path, shape) as directory:
        config = read_config(directory)
        model = build_meta(config, model_class(config))
    moe = next(iter(find_topology(model).moe_layers.values()))
    old = width_of(model, moe)
    layers = [index for index in shape.layers if index not in modifier.protect]
    widths = modifier.widths_from(old, layers)
    alone = modifier.measures_curves() or len(widths) < len(shape.layers)
    fields = {new: width_fields(model, moe, old, new, alone=alone).values for new in set(widths.values())}
    shape.widths = {index: fields[new] for index, new in widths.items()}
    gone = sum(old - new for new in widths.values()) / max(len(layers), 1)
    return f"{gone:g} of {old} channels per expert"


@contextmanager
def _trimmed(path: str | Path, shape: _Shape) -> Iterator[str]:
    """A directory with the config that the cut model has."""
    config = copy.deepcopy(read_config(path).parsed)
    keep_blocks(config, shape.blocks)
    counts = {new: shape.experts[old] for new, old in enumerate(shape.blocks) if old in shape.experts}
    describe_layers(config, counts)
    if shape.widths:
        describe_widths(
            config,
            {new: shape.widths.get(old, {}) for new, old in enumerate(shape.blocks) if counts.get(new)},
        )
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        yield directory


def _slim(directory: str, name: str, modifier: RouterAwareQuantModifier) -> Step:
    """The model after quantization: what it weighs follows from the budget, whatever is chosen within it."""
    if modifier.plan_path is not None:
        raise ForecastError(f"{name}: a plan decides the schemes; give target_bits or target_size.")
    parts = [
        (kinds, scheme)
        for kinds, scheme in (
            ((ATTENTION,), modifier.attention_scheme),
            ((DENSE, SHARED), modifier.dense_scheme),
        )
        if scheme is not None
    ]
    sharing = [
        kind
        for kinds, scheme in parts
        if shares_group_size(resolve_scheme(scheme, modifier.group_size, "scheme").scheme)
        for kind in kinds
    ]
    inspection = inspect_model(directory, modifier.schemes, modifier.group_size, sharing)
    if modifier.servable and modifier.granularity == "layer":
        candidates = resolve_schemes(modifier.schemes, modifier.group_size, "schemes")
        check_servable(inspection.model_type, candidates, all_layers=True)
    refused = [f"{size.scheme}: {size.refused}" for size in inspection.schemes if size.refused]
    if refused:
        raise ForecastError(f"{name}: {'; '.join(refused)}.")
    saved = sum(
        scheme_saving(directory, kinds, scheme, modifier.group_size, sharing) for kinds, scheme in parts
    )
    sizes = sorted(size.bits for size in inspection.schemes)
    smallest, largest = sizes[0], sizes[-1]
    # Packed matrices also carry their shape, which bits per weight leave out.
    saved -= max(inspection.nbytes_in(size) - inspection.nbytes_at(size.bits) for size in inspection.schemes)
    wanted = modifier.target_bits
    if wanted is None:
        wanted = inspection.bits_at(parse_bytes(modifier.target_size, "target_size") + saved)
    if wanted < smallest:
        raise ForecastError(
            f"{name}: the budget leaves {wanted:.4g} bits per expert weight, and its smallest scheme takes "
            f"{smallest:.4g}: the model cannot be smaller than "
            f"{bytes_text(inspection.nbytes_at(smallest) - saved)}. Raise the budget, or drop more before."
        )
    bits = min(wanted, largest)
    names = "/".join(size.scheme for size in inspection.schemes)
    return _step(f"{name}: {names}", inspection, bits, saved, at_most=smallest < bits < largest)
