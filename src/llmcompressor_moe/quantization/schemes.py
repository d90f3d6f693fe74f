"""Candidate schemes: from what a recipe says to compressed-tensors objects, refused early where they cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import (
    DynamicType,
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.registry import standardize_lookup_name
from llmcompressor.observers import Observer
from pydantic import ValidationError

__all__ = [
    "UNQUANTIZED",
    "Candidate",
    "SchemeSpec",
    "fitting_group_size",
    "needs_static_inputs",
    "resolve_scheme",
    "resolve_schemes",
    "shares_group_size",
    "why_not_divisible",
    "why_vllm_cannot_serve",
]

# compressed-tensors' name for leaving weights in 16 bit.
UNQUANTIZED = "UNQUANTIZED"

# A preset's name, or {name: {weights: ..., input_activations: ...}}.
SchemeSpec = str | dict[str, dict[str, Any]]

_GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
_OF_WEIGHTS = (
    *_GROUPED,
    QuantizationStrategy.TENSOR,
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.BLOCK,
)
# Widths that compressed-tensors packs and vLLM 0.32 unpacks for fused MoE layers.
_PACKED_BITS = range(2, 9)
# Fields of a written-out scheme that are not the recipe's to set, and why.
_NOT_TO_SET = {
    "targets": "the modifier knows which modules get the scheme",
    "format": "the scheme's storage format follows from the rest",
    "output_activations": "outputs of experts and of attention are not quantized",
}


@dataclass(frozen=True)
class Candidate:
    """A named scheme; ``scheme`` is None for weights that stay in 16 bit."""

    name: str
    scheme: QuantizationScheme | None

    @property
    def written(self) -> dict[str, Any] | None:
        """The scheme as files hold it, without targets."""
        return self.scheme and self.scheme.model_dump(mode="json", exclude={"targets"}, exclude_none=True)

    def for_targets(self, targets: Sequence[str]) -> QuantizationScheme:
        """A copy for these modules.

        :raises ValueError: the candidate leaves weights as they are
        """
        if self.scheme is None:
            raise ValueError(f"{self.name} quantizes nothing.")
        return self.scheme.model_copy(update={"targets": list(targets)}, deep=True)


def resolve_schemes(specs: Sequence[SchemeSpec], group_size: int | None, field: str) -> list[Candidate]:
    """Several candidates with distinct names.

    :param group_size: replaces the group size of group-wise integer weights
    :param field: the field's name, for messages
    :raises ValueError: a preset is unknown, a scheme is malformed, or a name is given twice
    """
    if not specs:
        raise ValueError(f"{field}={specs!r} must name at least one scheme.")
    candidates = [resolve_scheme(spec, group_size, field) for spec in specs]
    names = [candidate.name for candidate in candidates]
    if len(set(names)) != len(names):
        raise ValueError(f"{field}={names} names a scheme twice.")
    return candidates


def resolve_scheme(spec: SchemeSpec, group_size: int | None, field: str) -> Candidate:
    """One candidate.

    :raises ValueError: see `resolve_schemes`
    """
    if isinstance(spec, str):
        name = spec.upper()
        if name not in PRESET_SCHEMES:
            raise ValueError(
                f"{field}: {spec!r} is not a preset of compressed-tensors; there are "
                f"{', '.join(sorted(PRESET_SCHEMES))}. Other schemes are written out: "
                "{name: {weights: {num_bits: 3, type: int, strategy: group, group_size: 64}}}."
            )
        if name == UNQUANTIZED:
            return Candidate(UNQUANTIZED, None)
        scheme = preset_name_to_scheme(name, [])
    else:
        name, scheme = _written_out(spec, field)
    weights = scheme.weights
    if weights is None:
        raise ValueError(f"{field}: {name} has no weights to quantize; for 16 bit name {UNQUANTIZED}.")
    reason = _why_unusable(scheme)
    if reason is not None:
        raise ValueError(f"{field}: {name}: {reason}.")
    if group_size is not None and shares_group_size(scheme):
        weights.group_size = group_size
    return Candidate(name, scheme)


def _written_out(spec: dict[str, dict[str, Any]], field: str) -> tuple[str, QuantizationScheme]:
    if len(spec) != 1 or not isinstance(next(iter(spec.values())), dict):
        raise ValueError(f"{field}: {spec!r} must be one name with the scheme's fields below it.")
    ((name, fields),) = spec.items()
    if not name.strip() or name.upper() == UNQUANTIZED:
        raise ValueError(f"{field}: {name!r} is not a name for a scheme that quantizes; give it another.")
    for part, reason in _NOT_TO_SET.items():
        if fields.get(part):
            raise ValueError(f"{field}: {name}: leave out {part}={fields[part]!r}; {reason}.")
    try:
        return name, QuantizationScheme.model_validate({"targets": [], **fields})
    except (ValidationError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{field}: {name} is not a scheme that compressed-tensors knows: {_in_one_line(error)}."
        ) from error


def _in_one_line(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    details = [
        (".".join(map(str, detail["loc"])), detail["input"], detail["msg"].removeprefix("Value error, "))
        for detail in error.errors()
    ]
    return "; ".join(f"{place}={value!r}: {message.splitlines()[0]}" for place, value, message in details)


def _why_unusable(scheme: QuantizationScheme) -> str | None:
    """What compressed-tensors takes for a scheme, but no calibration, storage format or reader can handle."""
    weights, inputs = scheme.weights, scheme.input_activations
    for part, args in (("weights", weights), ("input_activations", inputs)):
        if args is None:
            continue
        if _is_int(args) and args.num_bits not in _PACKED_BITS:
            return f"{part}.num_bits={args.num_bits}: integers must have 2 to 8 bits"
        known = Observer.registered_names()
        if args.observer is not None and standardize_lookup_name(args.observer) not in known:
            return f"{part}.observer={args.observer!r} is unknown; there are {', '.join(known)}"
    strategy = QuantizationStrategy(weights.strategy)
    if strategy not in _OF_WEIGHTS:
        strategies = ", ".join(known.value for known in _OF_WEIGHTS)
        return f"weights.strategy={strategy.value!r} is not for weights; use one of {strategies}"
    if weights.dynamic:
        return f"weights.dynamic={weights.dynamic!r}: weights are rounded once; leave it out"
    if not _is_int(weights) and weights.num_bits == 4 and strategy not in _GROUPED:
        return (
            f"weights.strategy={strategy.value!r}: 4-bit floats are stored in groups only; use MXFP4 or NVFP4, or "
            "integers"
        )
    if not _is_int(weights) and weights.num_bits == 4 and weights.group_size not in (16, 32):
        return f"weights.group_size={weights.group_size}: 4-bit floats are stored in groups of 16 or 32"
    return None


def needs_static_inputs(scheme: QuantizationScheme | None) -> bool:
    """Whether scales of the inputs have to be calibrated."""
    inputs = scheme.input_activations if scheme else None
    return inputs is not None and inputs.dynamic in (False, DynamicType.LOCAL)


def fitting_group_size(inputs: Iterable[int]) -> int | None:
    """The group size to take for weights of these numbers of inputs, None where only channel-wise scales fit.

    One of those that vLLM has fast kernels for where possible, else the largest below 128
    that packs into whole words.
    """
    common = math.gcd(*inputs)
    sizes = [size for size in (128, 64, 32, *range(120, 8, -8)) if common % size == 0]
    return sizes[0] if sizes else None


def shares_group_size(scheme: QuantizationScheme | None) -> bool:
    """Whether the field ``group_size`` replaces the size of a scheme's groups."""
    return (
        scheme is not None
        and scheme.weights.strategy == QuantizationStrategy.GROUP
        and _is_int(scheme.weights)
    )


def why_not_divisible(
    scheme: QuantizationScheme, out_features: int, in_features: int, inputs: Iterable[int] = ()
) -> str | None:
    """Why a scheme's groups or blocks do not fit a weight [out, in]; None if they do.

    :param inputs: numbers of inputs of all weights that share the group size; the way out suits them too
    """
    weights = scheme.weights
    if weights.strategy in _GROUPED and in_features % weights.group_size:
        fitting = fitting_group_size((in_features, *inputs))
        if fitting is None:
            way_out = "use a scheme with channel-wise scales"
        elif shares_group_size(scheme):
            way_out = f"group_size={fitting} does"
        else:
            way_out = f"use a scheme of integers with group_size={fitting}"
        return f"group size {weights.group_size} does not divide its {in_features} inputs; {way_out}"
    if weights.strategy == QuantizationStrategy.BLOCK:
        rows, columns = weights.block_structure
        if out_features % rows or in_features % columns:
            return (
                f"blocks of {rows}x{columns} do not divide its shape {out_features}x{in_features}; use scales per "
                "channel or group"
            )
    return None


def why_vllm_cannot_serve(scheme: QuantizationScheme | None) -> str | None:
    """Why vLLM 0.32 has no method for fused MoE layers in this scheme; None if it has one."""
    if scheme is None:
        return None
    weights, inputs = scheme.weights, scheme.input_activations
    strategy = weights.strategy
    if _is_int(weights):
        if inputs is None:
            grouped = strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
            if grouped and weights.num_bits in _PACKED_BITS:
                return None
            return "integer weights must have 2 to 8 bits with scales per group or channel"
        dynamic = inputs.dynamic is True and inputs.strategy == QuantizationStrategy.TOKEN
        if weights.symmetric and dynamic and inputs.num_bits == 8:
            eight = weights.num_bits == 8 and _is_int(inputs) and strategy == QuantizationStrategy.CHANNEL
            four = weights.num_bits == 4 and strategy in (
                QuantizationStrategy.GROUP,
                QuantizationStrategy.CHANNEL,
            )
            # Cutlass' kernel for 8-bit float inputs knows one group size.
            if eight or (four and (_is_int(inputs) or weights.group_size == 128)):
                return None
        return "with quantized inputs only W8A8 (channel-wise), W4A8 and W4AFP8 (groups of 128) have a method"
    if weights.num_bits == 4:
        if weights.symmetric and (
            _is_mx(weights) or (_is_nv(weights) and (inputs is None or _is_nv(inputs)))
        ):
            return None
        return (
            "4-bit float weights must be MXFP4 (group, 32) or NVFP4 (tensor_group, 16, inputs alike or plain)"
        )
    if _is_mx(weights) and weights.scale_dtype == torch.uint8:
        return None
    if inputs is None or _is_int(inputs):
        return "8-bit float weights need 8-bit float inputs"
    pairs = (
        (QuantizationStrategy.TENSOR, QuantizationStrategy.TENSOR),
        (QuantizationStrategy.CHANNEL, QuantizationStrategy.TOKEN),
    )
    fits = strategy == QuantizationStrategy.BLOCK or (strategy, inputs.strategy) in pairs
    static = not inputs.dynamic and inputs.strategy != QuantizationStrategy.TENSOR
    if weights.symmetric and inputs.symmetric and fits and not static:
        return None
    return (
        "8-bit float weights must be symmetric, per tensor with inputs per tensor, per channel with dynamic "
        "inputs per token, or in blocks with dynamic inputs"
    )


def _is_mx(args: QuantizationArgs) -> bool:
    return args.strategy == QuantizationStrategy.GROUP and args.group_size == 32


def _is_nv(args: QuantizationArgs) -> bool:
    return args.strategy == QuantizationStrategy.TENSOR_GROUP and args.group_size == 16


def _is_int(args: QuantizationArgs) -> bool:
    return args.type == QuantizationType.INT
