"""The names that a checkpoint gives to what a transformers model calls otherwise, and back."""

from collections.abc import Collection

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from llmcompressor_moe.compat.transformers.conversions import own_mappings, save_by


class Naming:
    """Native names for tensors and modules of one meta model, by the given conversions."""

    def __init__(self, model: PreTrainedModel, conversions: list[WeightTransform]):
        self.model = model
        self.conversions = conversions
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.backward = [c.reverse_transform() for c in self.renamings[::-1]]
        self.source_position = {
            pattern: position
            for converter in self.converters
            for position, pattern in enumerate(converter.source_patterns)
        }
        self.runtime_state = model.state_dict()

    def runtime_of(self, native: str) -> tuple[str, int | None]:
        """The runtime tensor that a native one goes into, and its position among that tensor's sources."""
        if native in self.runtime_state:
            return native, None
        name, pattern = rename_source_key(
            native, self.renamings, self.converters, self.model.base_model_prefix, self.runtime_state
        )
        return name, None if pattern is None else self.source_position[pattern]

    def native_module(self, runtime: str) -> str:
        """The native name of a module whose tensors are renamed but not reshaped."""
        probe, _ = rename_source_key(f"{runtime}.weight", self.backward, [], reverse=False)
        return probe.removesuffix(".weight")

    def revert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Native names and shapes of runtime tensors, by the reversal that `save_pretrained` uses."""
        save_by(self.model, self.conversions)
        return revert_weight_conversion(self.model, state)


def find_naming(model: PreTrainedModel, stored: Collection[str]) -> Naming:
    """The naming of `model`'s architecture that names most of the `stored` tensors.

    There are two where a model may be saved with or without a prefix: a text model that was loaded from an
    image-text checkpoint keeps that checkpoint's prefix.
    """
    with own_mappings():
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    # save_pretrained leaves prefixes off a model that was not loaded
    usual = [c for c in conversions if not isinstance(c, PrefixChange)]
    namings = [Naming(model, usual)]
    if len(usual) < len(conversions):
        namings.append(Naming(model, conversions))
    if len(namings) == 1:
        return namings[0]
    state, _ = saved_state(model)
    return max(namings, key=lambda naming: sum(name in stored for name in naming.revert(state)))


def saved_state(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], set[str]]:
    """State dict as `save_pretrained` takes it, and the names that it leaves out as tied."""
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    kept = remove_tied_weights_from_state_dict(dict(state), model)
    return state, state.keys() - kept.keys()
