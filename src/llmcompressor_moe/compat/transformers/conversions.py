"""The tables by which transformers turns names of checkpoints into those of models, and back."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

__all__ = [
    "convert_like",
    "not_after",
    "own_conversions",
    "own_mappings",
    "save_by",
    "saved_as",
    "source_patterns",
]


def convert_like(model_type: str, other: str) -> None:
    """Give a family of our own the conversions of another, as transformers' own families share theirs.

    The public function makes transformers apply them to classes outside of itself. What it registers is not among
    the conversions that transformers defines, so nothing could restore it once others have overwritten it.
    """
    conversion_mapping._MODEL_TO_CONVERSION_PATTERN[model_type] = other
    _own_table.cache_clear()
    conversion_mapping.register_checkpoint_conversion_mapping(
        model_type, own_conversions(model_type), overwrite=True
    )


def own_conversions(model_type: str) -> list[WeightTransform] | None:
    """A family's conversions as transformers defines them, whoever has registered others; None without any.

    The public getter returns what was registered last.
    """
    return copy.deepcopy(_own_table().get(model_type))


@contextlib.contextmanager
def own_mappings() -> Iterator[None]:
    """Context in which every architecture has its own conversions, whoever has overwritten them.

    llm-compressor's ``load_quantizable_moe`` registers its own for good, and nothing unregisters them.
    """
    current = conversion_mapping._checkpoint_conversion_mapping_cache
    conversion_mapping._checkpoint_conversion_mapping_cache = (current or {}) | _own_table()
    try:
        yield
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache = current


@functools.cache
def _own_table() -> Mapping[str, list[WeightTransform]]:
    """All families' conversions. Making them compiles some 700 patterns; transformers hands out copies only."""
    return conversion_mapping._build_checkpoint_conversion_mapping()


def save_by(model: PreTrainedModel, conversions: list[WeightTransform]) -> None:
    """Have ``save_pretrained`` and ``revert_weight_conversion`` reverse these conversions.

    They look for an attribute that ``from_pretrained`` leaves behind. A model that was not loaded has none, one
    that was surgically changed has the wrong ones.
    """
    model._weight_conversions = conversions


def saved_as(model: PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """What ``save_pretrained`` makes of the name of a tensor: its name in the files, and the pattern of the rule
    that puts its values into another form, None where it is only renamed.

    `revert_weight_conversion` tells neither: it wants the tensors, and all that a rule puts together at once.
    """
    rules = getattr(model, "_weight_conversions", None)
    if rules is None:
        made = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
        # As transformers does: the prefix is that of a checkpoint, and this model came from none.
        rules = [rule for rule in made if not isinstance(rule, PrefixChange)]
    reverse = [rule.reverse_transform() for rule in rules[::-1]]
    renamings = [rule for rule in reverse if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in reverse if isinstance(rule, WeightConverter)]
    return lambda name: rename_source_key(name, renamings, converters, reverse=True)


def not_after(conversion: WeightConverter, places: Sequence[str]) -> WeightConverter:
    """A conversion that takes no names in which one of these patterns, of a fixed length each, stands right before
    what it looks for.

    Patterns of a conversion cannot be changed, and its copy with others has to know the parts of models that it
    was made for.
    """
    guard = "".join(f"(?<!{place})" for place in places)
    guarded = WeightConverter(
        [guard + pattern for pattern in conversion._original_source_patterns],
        conversion._original_target_patterns,
        conversion.operations,
    )
    guarded.scope_prefix, guarded.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return guarded


def source_patterns(conversion: WeightTransform) -> list[str]:
    """Names in checkpoints that a conversion takes, as they were written.

    The public ``source_patterns`` are rewritten for matching.
    """
    return conversion._original_source_patterns
