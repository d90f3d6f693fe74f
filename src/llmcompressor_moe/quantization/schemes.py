"""Candidate schemes: from what a recipe says to compressed-tensors objects, refused early where they cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressed_tensors.quantization import (
    DynamicType,
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from pydantic import ValidationError

__all__ = [
    "UNQUANTIZED",
    "Candidate",
    "SchemeSpec",
    "needs_static_inputs",
    "resolve_scheme",
    "resolve_schemes",
    "why_not_divisible",
    "why_vllm_cannot_serve",
]

# compressed-tensors' name for leaving weights in 16 bit.
UNQUANTIZED = "UNQUANTIZED"

# A preset's name, or {name: {weights: ..., input_activations: ...}}.
SchemeSpec = str | dict[str, dict[str, Any]]

_GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
# Widths that vLLM 0.32 unpacks for fused MoE layers.
_PACKED_BITS = range(2, 9)


@dataclass(frozen=True)
class Candidate:
    """A named scheme; ``scheme`` is None for weights that stay in 16 bit."""

    name: str
    scheme: QuantizationScheme | None

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
                f"{field}: {spec!r} is no preset of compressed-tensors; there are "
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
    if group_size is not None and weights.strategy == QuantizationStrategy.GROUP and _is_int(weights):
        weights.group_size = group_size
    return Candidate(name, scheme)


def _written_out(spec: dict[str, dict[str, Any]], field: str) -> tuple[str, QuantizationScheme]:
    if len(spec) != 1 or not isinstance(next(iter(spec.values())), dict):
        raise ValueError(f"{field}: {spec!r} must be one name with the scheme's fields below it.")
    ((name, fields),) = spec.items()
    try:
        return name, QuantizationScheme.model_validate({"targets": [], **fields})
    except (ValidationError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{field}: {name} is no scheme that compressed-tensors knows: {error}") from error


def needs_static_inputs(scheme: QuantizationScheme | None) -> bool:
    """Whether scales of the inputs have to be calibrated."""
    inputs = scheme.input_activations if scheme else None
    return inputs is not None and inputs.dynamic in (False, DynamicType.LOCAL)


def why_not_divisible(scheme: QuantizationScheme, out_features: int, in_features: int) -> str | None:
    """Why a scheme's groups or blocks do not fit a weight [out, in]; None if they do."""
    weights = scheme.weights
    if weights.strategy in _GROUPED and in_features % weights.group_size:
        fitting = [size for size in (256, 128, 96, 64, 48, 32, 16) if in_features % size == 0]
        way_out = f"group_size={fitting[0]} does" if fitting else "use a scheme with channel-wise scales"
        return f"group size {weights.group_size} does not divide its {in_features} inputs; {way_out}"
    if weights.strategy == QuantizationStrategy.BLOCK:
        rows, columns = weights.block_structure
        if out_features % rows or in_features % columns:
            return f"blocks of {rows}x{columns} do not divide its shape {out_features}x{in_features}"
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
            channels = (QuantizationStrategy.CHANNEL, QuantizationStrategy.TENSOR)
            eight = weights.num_bits == 8 and _is_int(inputs) and strategy in channels
            four = weights.num_bits == 4 and strategy in (
                QuantizationStrategy.GROUP,
                QuantizationStrategy.CHANNEL,
            )
            if eight or (four and (_is_int(inputs) or strategy == QuantizationStrategy.GROUP)):
                return None
        return "with quantized inputs only W8A8 (channel-wise), W4A8 and W4AFP8 have a method"
    if weights.num_bits == 4:
        return None
    if inputs is None:
        is_mx = strategy == QuantizationStrategy.GROUP and weights.group_size == 32
        return None if is_mx else "8-bit float weights need 8-bit float inputs"
    return None


def _is_int(args: QuantizationArgs) -> bool:
    return args.type == QuantizationType.INT
