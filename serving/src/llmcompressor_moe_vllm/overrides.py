"""Reads `per_layer_config` from a model's config into plain data, and refuses what cannot be honoured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The names under which configs count the routed experts of a layer: those that vLLM itself asks for, in
# ModelArchConfigConvertorBase.get_num_experts. An alias of one of them counts as that one.
EXPERT_COUNTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")

# The names under which configs say how wide the routed experts of a layer are; the first that a config has counts.
EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size")

SKIPPABLE = "mlp"


class UnsupportedOverrideError(ValueError):
    """A checkpoint asks for a difference between layers that cannot be served."""


@dataclass(frozen=True)
class LayerOverride:
    """What one layer has that the config's global values do not say."""

    dropped: bool = False
    """The layer's MoE feed-forward is gone; its tensors are not in the checkpoint."""
    num_experts: int | None = None
    """Routed experts of this layer; None where it has as many as the config says globally."""
    expert_width: int | None = None
    """Channels of this layer's routed experts; None where they have as many as the config says globally."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Config attributes (canonical names) that differ while this layer is built."""
    foreign: Mapping[str, Any] = field(default_factory=dict)
    """Overridden attributes that only an architecture reading `per_layer_config` itself can honour."""


Plan = Mapping[int, LayerOverride]


def concerns_experts(config: "PreTrainedConfig") -> bool:
    """Whether layers of `config` differ in what this plugin is for: a skipped part, an expert count or the width
    of experts.

    Other differences (per-layer head sizes, say) belong to the architectures that read them themselves.
    """
    if not getattr(config, "is_heterogeneous", False):
        return False
    overridden = {_canonical(config, name) for name in config.per_layer_attributes}
    return bool(overridden & (_count_names(config) | _width_names(config))) or any(
        layer.skip for layer in config.per_layer_config
    )


def read_plan(config: "PreTrainedConfig") -> Plan:
    """The overrides of a text config, by layer index; empty when no override concerns experts.

    Raises UnsupportedOverrideError naming the layer and the attribute: an unknown `skip` entry; a count that
    is not a positive integer, exceeds the global one or falls below top-k; a width that is not one;
    and for a `per_layer_config` that
    the installed transformers does not understand.
    """
    if not hasattr(type(config), "per_layer_config"):
        if getattr(config, "per_layer_config", None):
            raise UnsupportedOverrideError(
                "This checkpoint has `per_layer_config` (its layers differ), which the installed "
                "transformers does not understand. Install transformers 5.17 or newer."
            )
        return {}
    if not concerns_experts(config):
        return {}
    counts = _count_names(config)
    plan = {}
    for index, layer in enumerate(config.per_layer_config):
        override = _read_layer(index, layer, config, counts)
        if override is not None:
            plan[index] = override
    return plan


def global_count(config: "PreTrainedConfig", plan: Plan) -> int | None:
    """The experts of a layer that `plan` gives no count of its own; None where it changes experts of no layer."""
    if not any(override.values for override in plan.values()):
        return None
    return next(
        (value for name in _count_names(config) if isinstance(value := _global_value(config, name), int)),
        None,
    )


def _canonical(config: "PreTrainedConfig", name: str) -> str:
    return config.attribute_map.get(name, name)


def _count_names(config: "PreTrainedConfig") -> set[str]:
    return {_canonical(config, name) for name in EXPERT_COUNTS}


def _width_names(config: "PreTrainedConfig") -> set[str]:
    names = (_canonical(config, name) for name in EXPERT_WIDTHS)
    return set([name for name in names if name in config.__dict__][:1])


def _global_value(config: "PreTrainedConfig", name: str) -> Any:
    return config.__dict__.get(name)


def _read_layer(
    index: int, layer: "PreTrainedConfig", config: "PreTrainedConfig", counts: set[str]
) -> LayerOverride | None:
    unknown = [entry for entry in layer.skip if entry != SKIPPABLE]
    if unknown:
        raise UnsupportedOverrideError(
            f"Layer {index}: `skip` names {unknown}; only {[SKIPPABLE]}, the MoE feed-forward, can go."
        )
    dropped = SKIPPABLE in layer.skip
    overridden = {_canonical(config, name) for name in config.per_layer_attributes}
    differing = {
        name: getattr(layer, name)
        for name in sorted(overridden)
        if getattr(layer, name) != _global_value(config, name)
    }
    if not dropped and not differing:
        return None
    values, foreign, count, width = {}, {}, None, None
    for name, value in differing.items():
        if name in _width_names(config):
            _check_width(index, name, value)
            if not dropped:
                values[name] = width = value
        elif name not in counts:
            foreign[name] = value
        elif not dropped:
            _check_count(index, name, value, layer, _global_value(config, name))
            values[name] = count = value
    return LayerOverride(dropped, count, width, values, foreign)


def _check_width(index: int, name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise UnsupportedOverrideError(
            f"Layer {index}: `{name}` is {value!r}, which is not a number of channels."
        )


def _check_count(index: int, name: str, value: Any, layer: "PreTrainedConfig", largest: Any) -> None:
    where = f"Layer {index}: `{name}` is {value!r}"
    if not isinstance(value, int) or value < 1:
        raise UnsupportedOverrideError(
            f'{where}, which is not an expert count. A layer without its MoE has `"skip": ["{SKIPPABLE}"]` too.'
        )
    if isinstance(largest, int) and value > largest:
        # Weight loaders size their name tables by the global count: experts beyond it would stay unloaded.
        raise UnsupportedOverrideError(
            f"{where}, more than the global value {largest}. Write the largest count as the global value."
        )
    top_k = getattr(layer, "num_experts_per_tok", None)
    if isinstance(top_k, int) and value < top_k:
        raise UnsupportedOverrideError(f"{where}, fewer than the {top_k} experts every token is routed to.")
