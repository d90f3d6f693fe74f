"""Cut channels out of experts, and find the config fields that say how wide experts are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.offload import update_offload_parameter
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmcompressor_moe.checkpoint.reader import load_trimmed_moe
from llmcompressor_moe.compat.llmcompressor.linear_experts import (
    config_of,
    fused_class,
    linearize_without_weights,
)
from llmcompressor_moe.compat.transformers.building import build
from llmcompressor_moe.surgery.experts import select
from llmcompressor_moe.topology import MoELayer, expert_modules, text_config

__all__ = ["WidthFields", "keep_channels", "note_width", "width_fields", "width_of"]

# Integers that modules derive from their width.
_WIDTHS = ("intermediate_size", "intermediate_dim", "expert_dim", "ffn_dim", "moe_intermediate_size")


@torch.no_grad()
def keep_channels(expert: nn.Module, kept: Sequence[int], down: torch.Tensor | None = None) -> None:
    """Keep only some channels of an expert.

    :param expert: has an ``up_proj``, a ``down_proj`` and perhaps a ``gate_proj``, all Linear
    :param kept: indices of channels, in order
    :param down: [hidden, len(kept)] what the down projection becomes; None: its columns as they are
    """
    width = expert.down_proj.in_features
    for name in ("gate_proj", "up_proj"):
        linear = getattr(expert, name, None)
        if linear is None:
            continue
        select(linear, "weight", 0, kept)
        if linear.bias is not None:
            select(linear, "bias", 0, kept)
        linear.out_features = len(kept)
    select(expert.down_proj, "weight", 1, kept)
    expert.down_proj.in_features = len(kept)
    if down is not None:
        weight = expert.down_proj.weight
        update_offload_parameter(expert.down_proj, "weight", down.to(weight.device, weight.dtype))
    note_width(expert, width, len(kept))


def note_width(module: nn.Module, old: int, new: int) -> None:
    """Correct the integers by which a module remembers its width."""
    for name in _WIDTHS:
        if module.__dict__.get(name) == old:
            setattr(module, name, new)


def width_of(model: PreTrainedModel, moe: MoELayer) -> int:
    """Channels of a layer's routed experts.

    :param model: on any device (meta as well), linearized or not
    :raises ValueError: they have different widths
    """
    experts = model.get_submodule(moe.experts)
    if not isinstance(experts, LinearExperts2D):
        shapes = copy.copy(experts)
        # A shallow copy shares its table of parameters with the module, and moving one would move the other.
        shapes._parameters = {
            name: value.to("meta") for name, value in experts.named_parameters(recurse=False)
        }
        with torch.device("meta"):
            config = getattr(experts, "config", text_config(model.config))
            experts = linearize_without_weights(shapes, config)
    widths = {expert.down_proj.in_features for expert in expert_modules(experts)}
    if len(widths) > 1:
        raise ValueError(f"{moe.experts}: its experts have different widths, {sorted(widths)}.")
    return widths.pop()


@dataclass(frozen=True)
class WidthFields:
    """What a config has to say for experts of another width.

    :param values: field of the text config -> value
    :param shared: shared experts that get another width by these fields as well: paths from the MoE layer
    """

    values: Mapping[str, int]
    shared: tuple[str, ...]


def width_fields(
    model: PreTrainedModel, moe: MoELayer, old: int, new: int, *, alone: bool = False
) -> WidthFields:
    """Find the fields of a text config that make experts ``new`` channels wide and leave everything else alone,
    shared experts left out: by building the model on the meta device.

    Where one field also gives the width of shared experts, by a number of them, another such number may keep their
    width.

    :param model: on any device (meta as well), linearized or not
    :param moe: one of its MoE layers
    :param old: present width
    :param alone: whether a single field must do, which layers can have for themselves
    :raises ValueError: there are no such fields
    """
    config = text_config(model.config)
    experts = model.get_submodule(moe.experts)
    if config_of(experts, config) is not config:
        raise ValueError(
            f"{config.model_type!r}: its config lists one width for the experts of text and one for those of "
            "images, which this version does not cut. Use LayerDropModifier or BlockDropModifier."
        )
    fused_cls = fused_class(experts) if isinstance(experts, LinearExperts2D) else type(experts)
    shapes = _shapes(model, {})
    others: dict[str, list[str]] = {}
    for field in _fields_of(config, fused_cls, old, new):
        changed = _changed(shapes, _shapes(model, {field: new}), moe)
        shared = tuple(path for path in _relative(moe) if any(f".{path}." in name for name in changed))
        others[field] = [name for name in changed if not any(f".{path}." in name for path in shared)]
        if others[field]:
            continue
        for name, count in _shared_counts(config) if shared and not alone else ():
            fields = {field: new, name: old * count // new}
            if old * count % new == 0 and not _changed(shapes, _shapes(model, fields), moe):
                return WidthFields(fields | _other_names(config, old, new), ())
        names = _other_names(config, old, new)
        if alone and names:
            raise ValueError(
                f"{config.model_type!r}: {', '.join(names)} in its config says the width of experts to other "
                "readers, for all layers. Cut all layers alike."
            )
        return WidthFields({field: new} | names, shared)
    reason = "; ".join(f"{field} is also the width of {names[0]}" for field, names in others.items())
    raise ValueError(
        f"{config.model_type!r}: no field of its config says the width of its experts, {old}, and nothing else"
        + (f" ({reason})" if reason else "")
        + ", so a checkpoint with narrower experts could not be described. Use ExpertDropModifier."
    )


def _other_names(config: PreTrainedConfig, old: int, new: int) -> dict[str, int]:
    """Fields that transformers does not know and other readers may: the width under a name of theirs."""
    known = {field.name for field in dataclasses.fields(config)}
    return {
        name: new
        for name, value in config.__dict__.items()
        if name not in known and value == old and ("expert" in name or "moe" in name)
    }


def _fields_of(
    config: PreTrainedConfig, fused_cls: type[nn.Module] | None, old: int, new: int
) -> Iterator[str]:
    """Fields whose value is the width and changes the shape of a class of fused experts."""
    if fused_cls is None:
        return
    with torch.device("meta"):
        before = fused_cls(config).down_proj.shape
        for name, value in list(config.__dict__.items()):
            if isinstance(value, bool) or value != old or name.startswith("_"):
                continue
            probe = copy.copy(config)
            probe.__dict__[name] = new
            if fused_cls(probe).down_proj.shape != before:
                yield name


def _relative(moe: MoELayer) -> tuple[str, ...]:
    """Paths of shared experts from the MoE layer."""
    return tuple(path.removeprefix(f"{moe.module}.") for path in moe.shared_experts)


def _shapes(model: PreTrainedModel, fields: Mapping[str, int]) -> dict[str, torch.Size]:
    config = copy.deepcopy(model.config)
    text = text_config(config)
    for name, value in fields.items():
        setattr(text, name, value)
    with load_trimmed_moe(), torch.device("meta"):
        built = build(type(model), config)
    return {name: parameter.shape for name, parameter in built.named_parameters()}


def _changed(before: Mapping[str, torch.Size], after: Mapping[str, torch.Size], moe: MoELayer) -> list[str]:
    """Parameters outside of routed experts whose shapes differ."""
    experts = moe.experts.rpartition(".")[2]
    return [name for name, shape in before.items() if after.get(name) != shape and f".{experts}." not in name]


def _shared_counts(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    for name, value in config.__dict__.items():
        if "shared" in name and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield name, value
