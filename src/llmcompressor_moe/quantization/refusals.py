"""What cannot be quantized, found before any calibration; every message names the way out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.modifiers.transform.awq import AWQModifier
from torch import nn
from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.config_parts import quantization_of
from llmcompressor_moe.checkpoint.module_names import why_not_stored_alone
from llmcompressor_moe.checkpoint.opened import keeps_stored_precision
from llmcompressor_moe.families import exception_for
from llmcompressor_moe.quantization.schemes import (
    UNQUANTIZED,
    Candidate,
    shares_group_size,
    why_not_divisible,
    why_vllm_cannot_serve,
)
from llmcompressor_moe.topology import text_config

__all__ = [
    "check_names",
    "check_not_quantized",
    "check_others",
    "check_servable",
    "check_shapes",
    "quantized_linears",
]


def check_not_quantized(model: PreTrainedModel, names: Collection[str]) -> None:
    """Refuse a model that came quantized, and modules that an earlier modifier quantizes.

    :raises ValueError: names what is quantized
    """
    if keeps_stored_precision(model):
        raise ValueError(
            "The model is stored quantized; open it with open_moe(path, requantize=True) to decode it first, or "
            "start from the checkpoint that it was made from."
        )
    if quantization_of(model.config) is not None:
        raise ValueError(
            "The model is quantized already (its config has a quantization_config); give oneshot the checkpoint "
            "that it was made from."
        )
    modules = dict(model.named_modules())
    taken = [name for name in names if _rounds(getattr(modules[name], "quantization_scheme", None))]
    if taken:
        raise ValueError(
            f"{len(taken)} modules, {taken[0]!r} among them, are quantized already, by an earlier modifier of "
            "the recipe or before it: let only one modifier target them (targets, ignore), and start from a model "
            "that is not quantized."
        )


def _rounds(scheme: QuantizationScheme | None) -> bool:
    """Whether a scheme quantizes anything of a Linear; that of a KV cache alone has nothing to say of it."""
    return scheme is not None and any(
        part is not None for part in (scheme.weights, scheme.input_activations, scheme.output_activations)
    )


def check_others(
    model: PreTrainedModel, others: Iterable[Modifier], names: Collection[str], kv_cache: bool
) -> None:
    """Refuse recipes in which another modifier quantizes the same, or smooths for schemes not yet known.

    :param others: the other modifiers of the recipe
    :param names: of the modules that are to be quantized
    :param kv_cache: whether the KV cache is, too
    :raises ValueError: names the modifier
    """
    wanted = set(names)
    for other in others:
        kind = type(other).__name__
        if isinstance(other, AWQModifier):
            raise ValueError(
                f"{kind} searches its scales for schemes that RouterAwareQuantModifier chooses only when it runs; "
                "remove it from the recipe and set algorithm='awq'."
            )
        if not isinstance(other, QuantizationMixin) or not other.has_config():
            continue
        if kv_cache and other.kv_cache_scheme is not None:
            raise ValueError(
                f"{kind} of the same recipe quantizes the KV cache as well; keep one kv_cache_scheme."
            )
        shared = next((name for name in quantized_linears(other, model) if name in wanted), None)
        if shared is not None:
            raise ValueError(
                f"{kind} of the same recipe quantizes {shared!r} as well; let only one of them target it: add "
                "the experts to its ignore ('re:.*experts.*'), or remove it and use attention_scheme and "
                "dense_scheme."
            )


def quantized_linears(modifier: Modifier, model: nn.Module) -> list[str]:
    """Paths of the Linears that one of llm-compressor's modifiers quantizes; none for modifiers of other kinds."""
    if not isinstance(modifier, QuantizationMixin) or not modifier.has_config():
        return []
    targets = {
        target
        for scheme in modifier.resolved_config.config_groups.values()
        if _rounds(scheme)
        for target in scheme.targets
    }
    return [
        name
        for name, module in match_named_modules(model, targets, modifier.ignore)
        if isinstance(module, nn.Linear)
    ]


def check_shapes(asked: Iterable[tuple[str, Sequence[Candidate], Mapping[str, nn.Linear]]]) -> None:
    """Refuse schemes whose groups or blocks do not fit.

    :param asked: field of the recipe, its schemes, and the Linears that get one of them, by module path
    :raises ValueError: names the scheme, the module, both sizes and a size that fits all that share it
    """
    wanted: dict[tuple[str, str, tuple[int, int]], tuple[QuantizationScheme, str]] = {}
    for field, candidates, linears in asked:
        for name, linear in linears.items():
            for candidate in candidates:
                if candidate.scheme is not None:
                    key = (field, candidate.name, (linear.out_features, linear.in_features))
                    wanted.setdefault(key, (candidate.scheme, name))
    shared = {shape[1] for (_, _, shape), (scheme, _) in wanted.items() if shares_group_size(scheme)}
    for (field, candidate, shape), (scheme, name) in wanted.items():
        reason = why_not_divisible(scheme, *shape, shared)
        if reason:
            raise ValueError(f"{field}: {candidate} cannot quantize {name}: {reason}.")


def check_names(model: PreTrainedModel, asked: Iterable[tuple[str, Candidate, Iterable[str]]]) -> None:
    """Refuse schemes for Linears that the family's checkpoints, or transformers when it writes them, have no place
    of their own for.

    :param asked: field of the recipe, its scheme, and paths of the Linears that get it
    :raises ValueError: names the scheme, the module, the reason and the way out
    """
    reason_for = why_not_stored_alone(model)
    for field, candidate, names in asked:
        for name in names:
            reason = reason_for(name)
            if reason is not None:
                tail = re.escape(".".join(name.split(".")[-2:]))
                # All experts of a layer or none.
                pattern = "experts.*" if re.search(r"\.experts\.\d+\.", name) else f"{tail}$"
                raise ValueError(
                    f"{field}: {candidate.name} cannot quantize {name} of this "
                    f"{text_config(model.config).model_type!r} model: {reason}. Otherwise leave such modules in "
                    f"16 bit: add 're:.*{pattern}' to ignore."
                )


def check_servable(model_type: str, candidates: Sequence[Candidate], all_layers: bool) -> None:
    """Refuse schemes for experts that vLLM cannot serve in this architecture.

    :param all_layers: whether no MoE layer is left out
    :raises ValueError: names the scheme and the reason
    """
    way_out = "choose another scheme, or set servable=False for a checkpoint that only transformers runs"
    exception = exception_for(model_type)
    for candidate in candidates:
        reason = why_vllm_cannot_serve(candidate.scheme)
        family = exception.refuse_quantized_experts if candidate.scheme else None
        if reason or family:
            raise ValueError(
                f"schemes: vLLM cannot serve experts of {model_type!r} in {candidate.name}: {reason or family}; "
                f"{way_out}."
            )
    quantized = [candidate.name for candidate in candidates if candidate.scheme]
    plain = not all_layers or len(quantized) < len(candidates)
    if exception.refuse_partly_quantized and quantized and plain:
        what = f"schemes: {UNQUANTIZED} beside {quantized[0]}" if all_layers else "ignore: layers left out"
        raise ValueError(
            f"{what} cannot be served for {model_type!r}: {exception.refuse_partly_quantized}; quantize the "
            "experts of all layers, or set servable=False for a checkpoint that only transformers runs."
        )
